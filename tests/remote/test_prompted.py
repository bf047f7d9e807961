"""tuning_mode and pre_seq_len of the Petals API, by the servers' own code in this process."""

import peft
import pytest
import torch

import petals_tune
from petals_tune import AutoDistributedModelForCausalLM
from petals_tune.errors import ConfigError
from tests.models import BLOCKS, VOCABULARY, masks, plain_model, relative_error
from tests.parity import remote
from tests.raising import raises

TOLERANCE = 1e-5
ROWS, LENGTH, PROMPT = 3, 8, 4
IDS = torch.randint(3, VOCABULARY, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))


def test_tuning_mode_gives_the_numbers_of_pefts_prompt_tuning(folder):
    with remote(AutoDistributedModelForCausalLM, folder, tuning_mode="ptune", pre_seq_len=PROMPT) as model:
        plain = peft.get_peft_model(
            plain_model(folder), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=PROMPT)
        ).eval()
        name = "prompt_encoder.default.embedding.weight"
        plain.get_parameter(name).data.copy_(model.get_parameter(name))
        mask = masks(ROWS, LENGTH)["left"]
        given, wanted = (net(IDS, attention_mask=mask, labels=IDS) for net in (model, plain))
        assert relative_error(given.logits, wanted.logits[:, PROMPT:]) <= TOLERANCE
        assert relative_error(given.loss, wanted.loss) <= TOLERANCE
        for each in (given, wanted):
            each.loss.backward()
        assert [n for n, p in model.named_parameters() if p.requires_grad] == [name]
        assert relative_error(model.get_parameter(name).grad, plain.get_parameter(name).grad) <= TOLERANCE
        states = model(IDS, output_hidden_states=True).hidden_states
        assert [state.shape[1] for state in states] == [LENGTH] * (BLOCKS + 1)


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"tuning_mode": "ptune"}, "pre_seq_len"),
        ({"pre_seq_len": 3}, "tuning_mode"),
        ({"tuning_mode": "lora", "pre_seq_len": 3}, "tuning_mode"),
    ],
)
def test_a_wrong_mode_is_refused_by_name(folder, options, key):
    with raises(ConfigError, key=key):
        AutoDistributedModelForCausalLM.from_pretrained(str(folder), initial_peers=[], **options)


def test_a_classifier_with_a_soft_prompt_wants_padding_on_the_left(folder):
    auto = petals_tune.AutoDistributedModelForSequenceClassification
    with remote(auto, folder, tuning_mode="ptune", pre_seq_len=PROMPT, num_labels=2) as model:
        trained = [name for name, p in model.named_parameters() if p.requires_grad]
        assert any("score" in name for name in trained)
        assert any("prompt_encoder" in name for name in trained)
        labels = torch.arange(ROWS) % 2
        output = model(IDS, attention_mask=masks(ROWS, LENGTH)["left"], labels=labels)
        assert output.logits.shape == (ROWS, 2)
        output.loss.backward()
        with raises(ConfigError, key="padding_side"):
            model(IDS, attention_mask=masks(ROWS, LENGTH)["right"], labels=labels)
