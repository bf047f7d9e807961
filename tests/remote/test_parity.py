"""The issue's first promise: over real server processes, the numbers are those of the plain model and stock PEFT."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import peft
import pytest
import torch
from transformers import PreTrainedModel

from petals_tune import AutoDistributedModelForCausalLM
from tests.models import VOCABULARY, masks, relative_error
from tests.remote.conftest import Swarms

TOLERANCE = 1e-5
ROWS, LENGTH, PROMPT = 5, 9, 4
CUTS = (["0:6"], ["0:2", "2:6"], ["0:1", "1:4", "4:6"])

pytestmark = pytest.mark.swarm
SERVERS = pytest.mark.parametrize("servers", [1, 2, 3])


@pytest.fixture(scope="module", params=["bloom", "llama"])
def swarms(request: pytest.FixtureRequest, start_swarms: Callable) -> Iterator[Swarms]:
    """One, two and three servers with the same model."""
    with start_swarms(request.param, *CUTS) as started:
        yield started


def soft_prompt() -> peft.PeftConfig:
    return peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=PROMPT)


def lora(**changes) -> peft.PeftConfig:
    return peft.LoraConfig(
        **{"task_type": "CAUSAL_LM", "r": 4, "target_modules": "all-linear", "init_lora_weights": False, **changes}
    )


@dataclass(frozen=True, kw_only=True)
class Step:
    """What one step of training gives."""

    logits: torch.Tensor
    loss: torch.Tensor
    gradients: dict[str, torch.Tensor]


def batch(padding: str) -> dict[str, torch.Tensor]:
    mask = masks(ROWS, LENGTH)[padding]
    ids = torch.randint(VOCABULARY, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def step(
    model: PreTrainedModel,
    config: peft.PeftConfig,
    *,
    train: bool,
    padding: str = "none",
    inputs: dict[str, torch.Tensor] | None = None,
) -> Step:
    """One step of a fresh adapter, which is taken off again."""
    torch.manual_seed(1)
    tuned = peft.get_peft_model(model, config).train(train)
    output = tuned(**batch(padding) if inputs is None else inputs)
    output.loss.backward()
    gradients = {name: p.grad for name, p in tuned.named_parameters() if p.grad is not None}
    assert all(name in gradients for name, p in tuned.named_parameters() if p.requires_grad)
    if isinstance(config, peft.LoraConfig):
        tuned.unload()
    return Step(logits=output.logits.detach(), loss=output.loss.detach(), gradients=gradients)


def assert_same(remote: Step, plain: Step) -> None:
    assert relative_error(remote.logits, plain.logits) <= TOLERANCE
    assert relative_error(remote.loss, plain.loss) <= TOLERANCE
    assert remote.gradients.keys() == plain.gradients.keys()
    for name, gradient in plain.gradients.items():
        assert gradient.abs().max() > 0, name
        assert relative_error(remote.gradients[name], gradient) <= TOLERANCE, name


@SERVERS
@pytest.mark.parametrize("padding", ["none", "right"])
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_logits_loss_and_gradient_of_a_soft_prompt(swarms, servers, padding, train):
    remote = step(swarms.remote(servers), soft_prompt(), train=train, padding=padding)
    assert_same(remote, step(swarms.plain, soft_prompt(), train=train, padding=padding))
    assert list(remote.gradients) == ["prompt_encoder.default.embedding.weight"]


@SERVERS
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_padding_between_a_soft_prompt_and_the_text_changes_no_number(swarms, servers, train):
    """Plain models count it as distance, so they get the same rows with their padding on the right."""
    left = batch("left")
    mask = left["attention_mask"]
    left["labels"] = left["labels"].masked_fill(mask.cumsum(1) == 1, -100)  # padding would predict a row's first token
    order = mask.argsort(dim=1, descending=True, stable=True)
    right = {name: tensor.gather(1, order) for name, tensor in left.items()}
    remote = step(swarms.remote(servers), soft_prompt(), train=train, inputs=left)
    plain = step(swarms.plain, soft_prompt(), train=train, inputs=right)
    real = [
        found.logits[:, PROMPT:][inputs["attention_mask"] == 1] for found, inputs in ((remote, left), (plain, right))
    ]
    assert_same(replace(remote, logits=real[0]), replace(plain, logits=real[1]))


@SERVERS
@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_logits_loss_and_gradients_of_lora_on_every_linear(swarms, servers, padding, train):
    remote = step(swarms.remote(servers), lora(), train=train, padding=padding)
    assert_same(remote, step(swarms.plain, lora(), train=train, padding=padding))
    assert len(remote.gradients) >= 2 * 4 * 6, "two matrices, four linears or more, six blocks"


@SERVERS
@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_logits_without_any_adapter(swarms, servers, padding):
    inputs = batch(padding)
    inputs.pop("labels")
    with torch.no_grad():
        logits = swarms.remote(servers)(**inputs).logits
        assert relative_error(logits, swarms.plain(**inputs).logits) <= TOLERANCE


def test_servers_that_hand_their_outputs_on_give_the_same_numbers(swarms):
    """Three processes, of which each dials the next one; both ways, and a few tokens after that."""
    folder, peers = str(swarms.folder), swarms.peers[3]
    sent_bytes, ids = [], batch("none")["input_ids"]
    expected = swarms.plain.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    for rule in ("never", "always"):
        model = AutoDistributedModelForCausalLM.from_pretrained(
            folder, initial_peers=peers, micro_batch_rows=2, hand_over=rule
        )
        try:
            assert_same(step(model, lora(), train=True), step(swarms.plain, lora(), train=True))
            assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0), expected)
            assert model.remote_blocks.stats.retries == 0
            sent_bytes.append(model.remote_blocks.stats.sent_bytes)
        finally:
            model.remote_blocks.close()
    to_later_servers = 2 * 2 * ROWS * LENGTH * 32 * 4  # two of them, there and back, float32
    assert sent_bytes[0] - sent_bytes[1] > 0.8 * to_later_servers


def test_dropout_draws_the_same_however_many_servers_there_are(swarms):
    one, *others = [step(swarms.remote(n), lora(lora_dropout=0.5), train=True) for n in (1, 2, 3)]
    for other in others:
        assert_same(other, one)
    without = step(swarms.remote(1), lora(lora_dropout=0.5), train=False)
    assert relative_error(one.logits, without.logits) > 1e-2


@pytest.mark.parametrize("config", [soft_prompt, lora], ids=["prompt", "lora"])
def test_training_goes_the_same_way_and_the_saved_adapter_loads_with_stock_peft(swarms, config, tmp_path):
    losses, tuned = [], {}
    for name, model in (("remote", swarms.remote(2)), ("plain", swarms.plain)):
        torch.manual_seed(1)
        tuned[name] = peft.get_peft_model(model, config()).train()
        optimizer = torch.optim.AdamW([p for p in tuned[name].parameters() if p.requires_grad], lr=0.01)
        losses.append([])
        for _ in range(4):
            loss = tuned[name](**batch("right")).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.item())
        tuned[name].eval()
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0][-1] < losses[0][0]

    tuned["remote"].save_pretrained(tmp_path)
    inputs = batch("left" if config is lora else "right")
    with torch.no_grad():
        logits = tuned["remote"](**inputs).logits
    if config is lora:
        for model in tuned.values():
            model.unload()
    assert_small(tmp_path)
    loaded = peft.PeftModel.from_pretrained(swarms.plain, tmp_path)
    with torch.no_grad():
        assert relative_error(loaded(**inputs).logits, logits) <= TOLERANCE
    if config is lora:
        loaded.unload()


def assert_small(folder: Path) -> None:
    files = {file.name: file.stat().st_size for file in folder.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= files.keys()
    assert files["adapter_model.safetensors"] < 200_000, "what is trained, and nothing of the backbone"
