"""Which class a model is loaded as, and what it is told, by the servers' own code in this process."""

import copy
import json
import pickle
from typing import Any

import accelerate
import peft
import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, BloomForCausalLM

import petals_tune
from petals_tune import AutoDistributedModel, AutoDistributedModelForCausalLM, DistributedBloomForCausalLM
from petals_tune.errors import ConfigError, UnsupportedAdapter, UnsupportedModel
from tests.inprocess import in_process_swarm
from tests.models import VOCABULARY, masks, relative_error, save_model
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


def test_generation_options_of_the_checkpoint_count_as_locally(folder, tmp_path):
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    ids = IDS[:1]
    first = AutoModelForCausalLM.from_pretrained(folder).generate(ids, max_new_tokens=8, do_sample=False)[0, LENGTH:]
    options = {"eos_token_id": [int(first[3]), 7], "max_new_tokens": 6, "repetition_penalty": 1.5, "pad_token_id": 0}
    for file, told in (
        ("generation_config.json", options),
        (
            "config.json",
            json.loads((folder / "config.json").read_text()) | {"repetition_penalty": 1.4, "max_length": 13},
        ),
    ):
        (tmp_path / "generation_config.json").unlink(missing_ok=True)
        (tmp_path / file).write_text(json.dumps(told))
        plain = AutoModelForCausalLM.from_pretrained(tmp_path)
        with in_process_swarm(tmp_path, "0:6"), remote(AutoDistributedModelForCausalLM, tmp_path) as model:
            assert model.generation_config.to_dict() == plain.generation_config.to_dict()
            assert plain.generation_config.repetition_penalty == told["repetition_penalty"]
            assert torch.equal(model.generate(ids), plain.generate(ids))
        (tmp_path / file).write_bytes((folder / file).read_bytes())


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_a_dtype_is_named_as_in_transformers(tmp_path, dtype):
    save_model(tmp_path, "llama")
    AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16).save_pretrained(tmp_path)
    with in_process_swarm(tmp_path, "0:6"):
        with remote(AutoDistributedModelForCausalLM, tmp_path, dtype=dtype) as model:
            assert model.dtype is AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype).dtype is torch.bfloat16
        with raises(ConfigError, key="dtype", seen="int8"):
            AutoDistributedModelForCausalLM.from_pretrained(str(tmp_path), initial_peers=[], dtype="int8")


def test_a_model_is_printed(model):
    text = repr(model)
    assert "RemoteBlocks(blocks 0:6, on servers): ModuleList(" in text
    assert "(0-5): 6 x BloomBlock(" in text
    assert repr(model.remote_blocks[1:3]).startswith("RemoteSpan(blocks 1:3, on servers)")


def tuned(model: Any) -> peft.PeftModel:
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["query_key_value"], init_lora_weights=False)
    return peft.get_peft_model(model, config).eval()


def test_a_copy_has_an_adapter_of_its_own_and_the_same_servers(model, folder):
    net = tuned(model)
    copied = copy.deepcopy(net)
    blocks = copied.get_base_model().remote_blocks
    assert blocks is copied.get_base_model().transformer.h
    assert blocks.backbone.chain is model.remote_blocks.backbone.chain
    before = net(input_ids=IDS).logits
    assert torch.equal(copied(input_ids=IDS).logits, before)
    for name, parameter in copied.named_parameters():
        if "lora_B" in name:
            parameter.data.zero_()
    untuned = AutoModelForCausalLM.from_pretrained(folder)(input_ids=IDS).logits
    assert relative_error(copied(input_ids=IDS).logits, untuned) <= TOLERANCE
    assert torch.equal(net(input_ids=IDS).logits, before)
    assert relative_error(before, untuned) > 100 * TOLERANCE


def test_a_model_is_saved_by_its_state_and_not_pickled(model, tmp_path):
    net = tuned(model)
    assert pickle.loads(pickle.dumps(type(model))) is DistributedBloomForCausalLM
    with raises(ConfigError, key="remote_blocks"):
        torch.save(net, tmp_path / "net.pt")
    net.load_state_dict(net.state_dict())
    accelerator = accelerate.Accelerator(cpu=True)
    accelerator.prepare(net, torch.optim.SGD([each for each in net.parameters() if each.requires_grad]))
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    accelerator.save_state(str(tmp_path))
    for parameter in net.parameters():
        if parameter.requires_grad:
            parameter.data.add_(1)
    accelerator.load_state(str(tmp_path))
    after = net.state_dict()
    assert sum("lora_" in name for name in after) >= 2 * 6
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.slow
def test_compiled_code_breaks_at_remote_blocks_and_gives_the_same_numbers(model):
    net = tuned(model).train()

    def gradients(compiled: Any) -> list[torch.Tensor]:
        net.zero_grad()
        compiled(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
        return [each.grad for each in net.parameters() if each.grad is not None]

    found, wanted = gradients(torch.compile(net, backend="eager")), gradients(net)
    assert len(found) == len(wanted) == 2 * 6
    assert all(map(torch.equal, found, wanted))
    blocks, hidden = model.remote_blocks, torch.randn(ROWS, LENGTH, 32)

    def step(hidden: torch.Tensor) -> torch.Tensor:
        return blocks[1:3](hidden.relu()).relu()

    assert torch.equal(torch.compile(step, backend="eager")(hidden), step(hidden))


def test_adapter_names_are_refused_and_the_next_call_is_as_before(model):
    net = tuned(model)
    before = net(input_ids=IDS).logits
    names = ["default"] * ROWS
    with raises(UnsupportedAdapter, key="adapter_names"):
        net(input_ids=IDS, adapter_names=names)
    with raises(UnsupportedAdapter, key="adapter_names"):
        net.generate(input_ids=IDS, adapter_names=names, max_new_tokens=2)
    assert torch.equal(net(input_ids=IDS).logits, before)


def test_a_hook_on_a_block_is_refused_by_a_call_and_by_generate(model):
    with model.remote_blocks.get_submodule("2.mlp").register_forward_hook(lambda *_: None):
        with raises(UnsupportedAdapter, key="remote_blocks"):
            model(input_ids=IDS)
        with raises(UnsupportedAdapter, key="remote_blocks"):
            model.generate(IDS, max_new_tokens=2)
