"""generate() without an input: one text in several calls equals the text of one call."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from petals_tune import AutoDistributedModelForCausalLM
from petals_tune.errors import ConfigError
from tests.models import VOCABULARY, plain_model
from tests.parity import remote
from tests.raising import raises

ROWS, LENGTH, NEW = 2, 9, 12
IDS = torch.randint(3, VOCABULARY, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([[1] * LENGTH, [0] * 3 + [1] * (LENGTH - 3)])
LATER = 5  # tokens of each call


@pytest.fixture(scope="module")
def plain(folder: Path) -> Any:
    return plain_model(folder)


@pytest.fixture(scope="module")
def model(folder: Path) -> Iterator[Any]:
    with remote(AutoDistributedModelForCausalLM, folder) as loaded:
        yield loaded


def whole(plain: Any, ids: torch.Tensor = IDS, mask: torch.Tensor | None = None, **options: Any) -> torch.Tensor:
    torch.manual_seed(5)
    mask = torch.ones_like(ids) if mask is None else mask
    return plain.generate(ids, attention_mask=mask, max_new_tokens=NEW, pad_token_id=0, **options)


def in_calls(model: Any, ids: torch.Tensor = IDS, mask: torch.Tensor | None = None, **options: Any) -> torch.Tensor:
    """NEW tokens, in three calls."""
    torch.manual_seed(5)
    mask = torch.ones_like(ids) if mask is None else mask
    output = model.generate(ids, attention_mask=mask, max_new_tokens=LATER, pad_token_id=0, **options)
    for count in (LATER, NEW - 2 * LATER):
        output = model.generate(None, max_new_tokens=count, pad_token_id=0, **options)
    return output


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": False},
        {"do_sample": False, "mask": MASK},
        {"do_sample": True, "top_k": 5, "temperature": 0.7, "mask": MASK},
        {"do_sample": False, "repetition_penalty": 1.5},
    ],
    ids=["greedy", "padded", "sampling", "repetition penalty"],
)
def test_a_text_in_several_calls_is_that_of_one_call(model, plain, steps, options):
    for given in ({}, {"past_key_values": model.remote_blocks.new_session(64)}):
        steps.clear()
        with model.inference_session(max_length=64):
            found = in_calls(model, **given, **options)
        assert torch.equal(found, whole(plain, **options))
        assert [positions for _, positions in steps] == [LENGTH] * 2 + [1] * 2 * (found.shape[1] - LENGTH - 1)


def test_rows_that_have_ended_get_padding(model, plain):
    """Some rows end in the first call, some later, and the last one does not."""
    ids = torch.randint(3, VOCABULARY, (4, LENGTH), generator=torch.Generator().manual_seed(8))
    sampling = {"do_sample": True, "temperature": 3.0, "top_k": 0}
    free = whole(plain, ids, **sampling)[:, LENGTH:]
    ends = [next(int(token) for token in row if token not in free[3]) for row in (free[0, 1:], free[1, LATER + 1 :])]
    wanted = whole(plain, ids, eos_token_id=ends, **sampling)
    lengths = (wanted[:, LENGTH:] != 0).sum(dim=1).tolist()
    assert lengths[0] < LATER < sorted(lengths)[2] <= lengths[3] == NEW, lengths
    with model.inference_session(max_length=64):
        assert torch.equal(in_calls(model, ids, eos_token_id=ends, **sampling), wanted)


def test_a_text_that_has_ended_is_returned_as_it_is(model, plain):
    ends = int(whole(plain, do_sample=False)[0, LENGTH + 2])
    with model.inference_session(max_length=64) as session:
        first = model.generate(IDS[:1], max_new_tokens=NEW, do_sample=False, eos_token_id=ends, pad_token_id=0)
        again = model.generate(None, max_new_tokens=NEW, return_dict_in_generate=True)
        assert torch.equal(again.sequences, first)
        session.position = session.position  # from here on, the text is what the caches hold
        assert model.generate(max_new_tokens=1, do_sample=False, pad_token_id=0).shape[1] == first.shape[1]


def test_it_goes_on_from_steps_by_hand_from_an_earlier_position_and_with_other_options(model, plain):
    with torch.no_grad(), model.inference_session(max_length=64) as session:
        model(input_ids=IDS, past_key_values=session)
        wanted = whole(plain, do_sample=False)
        assert torch.equal(model.generate(None, max_new_tokens=NEW, do_sample=False, pad_token_id=0), wanted)
        session.position = LENGTH + 3
        again = model.generate(max_new_tokens=NEW - 3, do_sample=False, pad_token_id=0)
        assert torch.equal(again, wanted)
        options = {"max_new_tokens": 4, "num_beams": 3, "do_sample": False, "pad_token_id": 0}
        found = model.generate(None, num_return_sequences=2, **options)
        mask = torch.ones_like(wanted)
        assert torch.equal(found, plain.generate(wanted, attention_mask=mask, num_return_sequences=2, **options))
        found, before = model.generate(None, **{**options, "num_beams": 1}), found
        mask = torch.ones_like(before)
        assert torch.equal(found, plain.generate(before, attention_mask=mask, **{**options, "num_beams": 1}))


def test_tuned_models_go_on_too(model, plain):
    nets = []
    for each in (model, plain):
        net = peft.get_peft_model(each, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)).eval()
        net.prompt_encoder["default"].embedding.weight.data.normal_(generator=torch.Generator().manual_seed(1))
        nets.append(net)
    options = {"do_sample": False, "pad_token_id": 0}
    wanted = nets[1].generate(input_ids=IDS[:1], max_new_tokens=8, **options)
    with model.inference_session(max_length=64):
        nets[0].generate(input_ids=IDS[:1], max_new_tokens=5, **options)
        assert torch.equal(nets[0].generate(input_ids=None, max_new_tokens=3, **options), wanted)


@pytest.mark.parametrize("method", ["lora", "prompt"])
def test_a_named_adapter_goes_on_with_its_text(model, plain, folder, method):
    config: peft.PeftConfig = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    if method == "lora":
        config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["query_key_value"])
    nets = model.adapters.add("mine", config), peft.get_peft_model(plain_model(folder), config)
    for net in nets:
        for name, parameter in net.named_parameters():
            if parameter.requires_grad:
                parameter.data.normal_(generator=torch.Generator().manual_seed(len(name)), std=0.5)
    options = {"do_sample": False, "pad_token_id": 0}
    wanted = nets[1].eval().generate(input_ids=IDS[:1], max_new_tokens=8, **options)
    with model.inference_session(max_length=64):
        nets[0].eval()
        model.generate(input_ids=IDS[:1], max_new_tokens=5, adapter="mine", **options)
        assert torch.equal(model.generate(max_new_tokens=3, adapter="mine", **options), wanted)
        base = model.generate(max_new_tokens=3, adapter=None, **options)
    assert torch.equal(
        base, plain.generate(wanted, attention_mask=torch.ones_like(wanted), max_new_tokens=3, **options)
    )


def test_where_no_text_stands_an_input_is_asked_for(model):
    with model.inference_session(max_length=32) as session:
        with raises(ConfigError, key="input_ids", seen=0):
            model.generate(max_new_tokens=2)
        with raises(ConfigError, key="input_ids", seen=0):
            model.generate(None, past_key_values=session, max_new_tokens=2)
        embeddings = model.get_input_embeddings()(IDS)
        model.generate(inputs_embeds=embeddings, attention_mask=torch.ones_like(IDS), max_new_tokens=2, pad_token_id=0)
        with raises(ConfigError, key="input_ids", seen=session.position):
            model.generate(max_new_tokens=2)


def test_without_a_session_it_is_as_in_transformers(model, plain):
    options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(**options), plain.generate(**options))
