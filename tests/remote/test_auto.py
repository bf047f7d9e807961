"""Which class a model is loaded as, and what it is told, by the servers' own code in this process."""

import pytest
import torch
from transformers import AutoModel, BloomForCausalLM

import petals_tune
from petals_tune import AutoDistributedModel, AutoDistributedModelForCausalLM, DistributedBloomForCausalLM
from petals_tune.errors import ConfigError, UnsupportedModel
from tests.models import VOCABULARY, masks, relative_error
from tests.parity import remote
from tests.raising import raises

TOLERANCE = 1e-5
ROWS, LENGTH = 3, 8
IDS = torch.randint(3, VOCABULARY, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))


def test_a_class_by_name_is_the_librarys_with_remote_blocks(model, folder):
    assert type(model) is DistributedBloomForCausalLM
    assert issubclass(DistributedBloomForCausalLM, BloomForCausalLM)
    assert petals_tune.DistributedLlamaForSequenceClassification.__name__ == "DistributedLlamaForSequenceClassification"
    with pytest.raises(AttributeError, match="transformers has no model class for 'DistributedNobody'"):
        _ = petals_tune.DistributedNobody
    with raises(UnsupportedModel, source=str(folder), model_type="bloom"):
        petals_tune.DistributedLlamaForCausalLM.from_pretrained(str(folder), initial_peers=[])


def test_the_base_model_alone(folder):
    with remote(AutoDistributedModel, folder) as model:
        plain = AutoModel.from_pretrained(folder)
        mask = masks(ROWS, LENGTH)["left"]
        with torch.no_grad():
            given, wanted = (each(input_ids=IDS, attention_mask=mask).last_hidden_state for each in (model, plain))
        assert type(model).__name__ == "DistributedBloomModel"
        assert relative_error(given[mask.bool()], wanted[mask.bool()]) <= TOLERANCE


def test_an_option_that_there_is_not_is_refused_by_name(folder):
    with raises(ConfigError, key="num_lables"):
        AutoDistributedModelForCausalLM.from_pretrained(str(folder), initial_peers=[], num_lables=3)


def test_an_auto_class_that_transformers_does_not_have_for_a_model_is_refused_by_its_type(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    with raises(UnsupportedModel, source=str(tmp_path), model_type="vit"):
        AutoDistributedModelForCausalLM.from_pretrained(str(tmp_path), initial_peers=[])


def test_what_is_loaded_is_frozen_but_a_head_that_the_checkpoint_lacks(model, folder):
    assert not any(parameter.requires_grad for parameter in model.parameters())
    auto = petals_tune.AutoDistributedModelForSequenceClassification
    with remote(auto, folder, num_labels=5) as classifier:
        assert classifier.config.num_labels == 5
        assert [name for name, p in classifier.named_parameters() if p.requires_grad] == ["score.weight"]
        assert classifier.score.weight.shape[0] == 5
