"""Deep prompts on a model in this process: what they add and where, and their files."""

import peft
import pytest
import torch
from safetensors.torch import save_file

from petals_tune.errors import ConfigError, UnsupportedAdapter
from petals_tune.tuning.deep_prompt import (
    FILE,
    DeepPromptConfig,
    deep_prompts,
    load_deep_prompts,
    save_deep_prompts,
)
from petals_tune.tuning.support import tune
from tests.models import BLOCKS, VOCABULARY, plain_model, save_model
from tests.raising import raises

TOKENS, WIDTH = 3, 32


@pytest.fixture(params=["bloom", "llama"])
def model(request, tmp_path):
    return plain_model(save_model(tmp_path / "model", request.param))


def config() -> DeepPromptConfig:
    return DeepPromptConfig(task_type="CAUSAL_LM", num_virtual_tokens=TOKENS)


def test_they_start_as_a_plain_soft_prompt_and_all_of_them_are_trained(model):
    ids = torch.randint(VOCABULARY, (2, 5))
    torch.manual_seed(0)
    plain = peft.get_peft_model(model, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=TOKENS))
    before = plain(ids).logits
    torch.manual_seed(0)
    net = tune(model, config())
    torch.testing.assert_close(net(ids).logits, before, rtol=0, atol=0)
    net(ids, labels=ids).loss.backward()
    trained = {name: tuple(p.shape) for name, p in net.named_parameters() if p.requires_grad}
    assert sorted(trained.values()) == sorted([(TOKENS, WIDTH)] * (1 + BLOCKS))
    assert all(p.grad.abs().max() > 0 for p in net.parameters() if p.requires_grad)


def test_a_prompt_is_added_to_the_first_positions_of_its_block_alone(model):
    net = tune(model, config())
    block = next(module for module in model.modules() if hasattr(module, "deep_prompt"))
    block.deep_prompt.prompt.data += 1
    hidden = torch.zeros(2, TOKENS + 4, WIDTH)
    (added, kept), options = block.deep_prompt.add(block, (hidden, "more"), {"option": 1})
    assert (kept, options) == ("more", {"option": 1})
    assert added[:, :TOKENS].eq(1).all()
    assert added[:, TOKENS:].eq(0).all()
    assert deep_prompts(net.get_base_model())[0].eq(1).all()
    assert deep_prompts(net.get_base_model())[1:].eq(0).all()


def test_a_cache_that_holds_the_first_positions_is_refused(model):
    """Local blocks would add prompts to every token."""
    net, ids = tune(model, config()).eval(), torch.randint(VOCABULARY, (1, 5))
    for parameter in net.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter)
    with raises(UnsupportedAdapter, key="use_cache"):
        net.generate(ids, max_new_tokens=3, do_sample=False)
    text = net.generate(ids, max_new_tokens=3, do_sample=False, use_cache=False)
    for length in range(5, 8):
        assert text[0, length] == net(text[:, :length]).logits[0, -1].argmax()


def test_files_come_back_on_another_model_and_damaged_ones_are_refused(model, tmp_path):
    net = tune(model, config())
    for parameter in net.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter)
    saved = deep_prompts(model)
    assert saved.shape == (BLOCKS, TOKENS, WIDTH)
    save_deep_prompts(model, tmp_path)
    net.save_pretrained(tmp_path)
    ids = torch.randint(VOCABULARY, (2, 5))
    expected = net.eval()(ids).logits

    other = plain_model(tmp_path / "model")
    loaded = peft.PeftModel.from_pretrained(other, tmp_path)
    load_deep_prompts(other, tmp_path)
    torch.testing.assert_close(loaded.eval()(ids).logits, expected, rtol=0, atol=0)
    assert not any(p.requires_grad for p in other.parameters())

    save_file({"prompts": torch.zeros(BLOCKS, TOKENS, WIDTH + 1)}, tmp_path / FILE)
    with raises(ConfigError, seen=(BLOCKS, TOKENS, WIDTH + 1)):
        load_deep_prompts(other, tmp_path)
    (tmp_path / FILE).write_bytes(b"nothing")
    with raises(ConfigError, seen=tmp_path / FILE):
        load_deep_prompts(other, tmp_path)


def test_a_model_without_any_has_none_to_save(model, tmp_path):
    assert deep_prompts(model) is None
    with raises(ConfigError, key="tuning"):
        save_deep_prompts(model, tmp_path)
