"""Adapters of a model by name: loaded, trained, replaced and removed while other threads call the model."""

import copy
from concurrent.futures import ThreadPoolExecutor
from threading import Event

import peft
import pytest
import torch
from transformers.generation.streamers import BaseStreamer

from petals_tune.errors import ConfigError, UnsupportedAdapter
from petals_tune.tuning.deep_prompt import load_deep_prompts
from tests.models import relative_error
from tests.raising import raises
from tests.remote.adapters.conftest import IDS, METHODS, TASK, generated


class Held(BaseStreamer):
    """Stops a generation after its second token until it is let go on."""

    def __init__(self) -> None:
        self.inside, self.go_on, self.puts = Event(), Event(), 0

    def put(self, value: torch.Tensor) -> None:
        self.puts += 1
        if self.puts == 3:  # the prompt, and two tokens
            self.inside.set()
            assert self.go_on.wait(60)

    def end(self) -> None:
        pass


@pytest.mark.parametrize("change", ["replaced", "removed", "trained"])
def test_a_generation_keeps_the_adapter_that_it_began_with(saved, model, change):
    """Its part in the blocks, and the head, which is here."""
    net = model.adapters.load("mine", saved.folders["head"], trainable=True)
    expected = generated(model, IDS[:1], adapter="mine")
    held = Held()
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(generated, model, IDS[:1], adapter="mine", streamer=held)
        assert held.inside.wait(60)
        if change == "replaced":
            model.adapters.load("mine", saved.folders["prompt"])
        elif change == "removed":
            model.adapters.remove("mine")
        else:
            with torch.no_grad():
                for parameter in net.parameters():
                    if parameter.requires_grad:
                        parameter.mul_(-1)
        after = None if change == "removed" else generated(model, IDS[:1], adapter="mine")
        held.go_on.set()
        assert torch.equal(running.result(), expected)
    if change == "replaced":
        assert torch.equal(after, generated(saved.plain("prompt"), IDS[:1]))
    elif change == "removed":
        with raises(ConfigError, key="adapter", seen="mine"):
            generated(model, IDS[:1], adapter="mine")
    else:
        assert not torch.equal(after, expected)


def test_a_session_begins_anew_when_its_adapter_was_loaded_anew(saved, model):
    model.adapters.load("mine", saved.folders["prompt"])
    with model.inference_session(max_length=32):
        generated(model, IDS[:1], adapter="mine")
        model.adapters.load("mine", saved.folders["deep"])
        found = generated(model, IDS[:1], adapter="mine")
    assert torch.equal(found, generated(saved.plain("deep"), IDS[:1], use_cache=False))


@pytest.mark.parametrize(
    "name", [name if name in ("head", "deep") else pytest.param(name, marks=pytest.mark.slow) for name in METHODS]
)
def test_what_is_trained_by_name_is_saved_for_stock_peft(saved, model, name, tmp_path):
    """A step with an optimizer of its own: the same tensors as in process."""
    nets = []
    for base in (model, saved.plain(None)):
        torch.manual_seed(7)
        if base is model:
            net = model.adapters.add("new", METHODS[name]()).train()
            loss = model(input_ids=IDS, labels=IDS, adapter="new").loss
        else:
            from petals_tune.tuning.support import tune

            net = tune(base, METHODS[name]()).train()
            loss = net(input_ids=IDS, labels=IDS).loss
        own = [parameter for parameter in net.parameters() if parameter.requires_grad]
        optimizer = torch.optim.SGD(own, lr=0.1)
        loss.backward()
        optimizer.step()
        nets.append(net.eval())
    for one, other in zip(*([p for p in net.parameters() if p.requires_grad] for net in nets), strict=True):
        assert relative_error(one, other) <= 1e-5
    nets[0].save_pretrained(str(tmp_path), save_embedding_layers=False)
    if name != "deep":
        again = peft.PeftModel.from_pretrained(saved.plain(None), str(tmp_path))
        with torch.no_grad():
            expected = again(input_ids=IDS).logits
            assert relative_error(model(input_ids=IDS, adapter="new").logits, expected) <= 1e-5


def test_adapters_share_what_is_frozen_and_nothing_that_is_trained(saved, shared):
    frozen = {id(parameter) for parameter in shared.parameters()}
    trained: set[int] = set()
    for name, net in shared.adapters.items():
        own = {id(p) for key, p in net.named_parameters() if id(p) not in frozen and ".layers." not in key}
        big = {id(p) for p in net.parameters() if p.numel() >= 96 * 32 and any(p.stride())}
        assert name == "head" or big <= frozen, "the embeddings and the head"
        assert not own & trained
        trained |= own
    assert list(shared.adapters) == list(METHODS)
    assert len(shared.adapters) == len(METHODS)


def test_a_copied_model_begins_without_adapters(shared):
    copied = copy.deepcopy(shared)
    assert not copied.adapters
    assert len(shared.adapters) == len(METHODS)
    with torch.no_grad():
        assert torch.equal(copied(input_ids=IDS).logits, shared(input_ids=IDS, adapter=None).logits)


def test_an_adapter_that_is_not_for_this_model_is_refused(saved, model, tmp_path):
    with raises(ConfigError, key="adapter"):
        model.adapters.load("mine", tmp_path)
    other = peft.get_peft_model(
        saved.plain(None), peft.LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj"], modules_to_save=[])
    )
    other.save_pretrained(str(tmp_path / "classifier"))
    with raises(ConfigError, key="adapter", seen="SEQ_CLS"):
        model.adapters.load("mine", tmp_path / "classifier")
    with raises(UnsupportedAdapter, key="tuning"):
        model.adapters.add("mine", peft.PrefixTuningConfig(task_type=TASK, num_virtual_tokens=2))
    for wrong in ("", None):
        with raises(ConfigError, key="adapter", seen=wrong):
            model.adapters.load(wrong, saved.folders["lora"])
    with raises(ConfigError, key="adapter", seen="mine"):
        model.adapters.remove("mine")
    assert not model.adapters


def test_a_model_with_pefts_layers_takes_no_others_beside_them(saved, model):
    net = peft.get_peft_model(model, METHODS["lora"]())
    with raises(ConfigError, key="adapters", seen="mine"):
        model.adapters.load("mine", saved.folders["prompt"])
    net.unload()
    model.adapters.load("mine", saved.folders["prompt"])


def test_only_a_peft_model_around_this_model_is_adopted(saved, model):
    with raises(ConfigError, key="adapters"):
        model.adapters.adopt(saved.plain("prompt"))


def test_deep_prompts_are_adopted_with_the_soft_prompt_that_they_belong_to(saved, model):
    config = peft.PromptTuningConfig(task_type=TASK, num_virtual_tokens=2)
    net = peft.get_peft_model(model, config, adapter_name="other")
    net.load_adapter(str(saved.folders["deep"]), adapter_name="mine")
    load_deep_prompts(model, saved.folders["deep"])
    with raises(ConfigError, key="adapters", seen=["default"]):
        model.adapters.adopt(net)
    load_deep_prompts(model, saved.folders["deep"], adapter="mine")
    model.adapters.adopt(net)
    with torch.no_grad():
        found = model(input_ids=IDS, adapter="mine").logits
        assert relative_error(found, saved.plain("deep")(input_ids=IDS).logits) <= 1e-5
        found = model(input_ids=IDS, adapter=None).logits
        assert relative_error(found, saved.plain(None)(input_ids=IDS).logits) <= 1e-5


def test_many_adapters_in_turn_are_uploaded_once(saved, model):
    """More than a stream or a server once remembered."""
    count, stats = 10, model.remote_blocks.stats
    for number in range(count):
        model.adapters.add(f"number {number}", METHODS["lora"]())
    sent = []
    with torch.no_grad():
        for _ in range(2):
            before = stats.sent_bytes
            for number in range(count):
                model(input_ids=IDS[:1], adapter=f"number {number}")
            sent.append(stats.sent_bytes - before)
        before = stats.sent_bytes
        for _ in range(count):
            model(input_ids=IDS[:1], adapter=None)
    assert sent[1] < 1.2 * (stats.sent_bytes - before) < sent[0] / 2
