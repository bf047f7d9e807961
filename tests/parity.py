"""How far a family's model with remote blocks is from the plain one: what a test asserts and a benchmark prints."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import torch
from transformers import AutoModelForSequenceClassification
from transformers.pytorch_utils import Conv1D

from petals_tune import AutoDistributedModelForCausalLM, AutoDistributedModelForSequenceClassification
from petals_tune.adapters.base import expert_parameters
from petals_tune.model.families import family_of
from petals_tune.model.nested import decoder_path, is_nested
from tests.inprocess import in_process_swarm
from tests.models import VOCABULARY, config_of, masks, plain_model, relative_error, save_model

ROWS, LENGTH, NEW = 3, 9, 6
CUT = ("0:2", "2:6")  # the second server's blocks begin in the middle of every pattern of layers
LABELS = 3


def parity(family: str, folder: Path, *, cut: Sequence[str] = CUT, **options: Any) -> dict[str, float]:
    """The largest relative errors of a family by what was compared; `tokens` is the share of equal ones.

    `cut`: the blocks of each server; `options` of `from_pretrained`.
    """
    save_model(folder, family)
    with in_process_swarm(folder, *cut):
        with remote(AutoDistributedModelForCausalLM, folder, **options) as model:
            plain = plain_model(folder)
            figures = _hidden_states(model, plain) | {"tokens": _equal_tokens(model, plain)}
            figures |= _training(model, plain)
        if type(config_of(family)) in AutoDistributedModelForSequenceClassification._mapping:
            with remote(AutoDistributedModelForSequenceClassification, folder, num_labels=LABELS, **options) as model:
                figures["classification"] = _classification(model, folder)
    return figures


@contextmanager
def remote(auto: Any, folder: Path, **options: Any) -> Iterator[Any]:
    torch.manual_seed(0)
    # The plain model's batch: some processors multiply two rows and three in different orders, and the differences of
    # rounding, 5e-5 of the largest LoRA gradient of one family, would hide faults. tests/remote/test_parity.py cuts it.
    model = auto.from_pretrained(str(folder), initial_peers=[], micro_batch_rows=ROWS, **options)
    try:
        yield model
    finally:
        model.remote_blocks.close()


def in_float32(model: Any, device: str = "cpu") -> Any:
    """The plain model with blocks that know no autocast, as those of servers."""
    for layer in model.model.layers:

        def forward(hidden: torch.Tensor, *args: Any, _forward: Any = layer.forward, **kwargs: Any) -> Any:
            with torch.autocast(torch.device(device).type, enabled=False):
                return _forward(hidden.float(), *args, **kwargs)

        layer.forward = forward
    return model


def _batches() -> Iterator[dict[str, torch.Tensor]]:
    ids = torch.randint(3, VOCABULARY, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    for mask in masks(ROWS, LENGTH).values():
        yield {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}


def _training(model: Any, plain: Any) -> dict[str, float]:
    """One step of LoRA on all linears, with the gradient at the embeddings, for each side of padding."""
    worst = dict.fromkeys(("logits", "loss", "input gradient", "LoRA gradients"), 0.0)
    path = decoder_path(plain)
    decoder = plain.get_submodule(path)
    family = family_of(decoder)
    blocks = family.blocks_of(decoder)
    linears = {name for name, module in blocks.named_modules() if isinstance(module, torch.nn.Linear | Conv1D)}
    experts = {each.name for module in blocks.modules() for each in expert_parameters(module)}
    if experts:
        # Shared experts have linears of the same names, and PEFT takes either.
        attention = ("q_proj", "k_proj", "v_proj", "o_proj", "in_proj")  # Nemotron-H calls all that blocks do "mixer"
        linears = {name for name in linears if ("attn" in name and "gate_proj" not in name) or name.endswith(attention)}
    # Beside Mamba, PEFT takes no adapter on these; and the library multiplies by the weight of `dt_proj` itself.
    linears -= {name for name in linears if re.search(r"(mamba|mixer)\.(out_proj|dt_proj)", name)}
    targets: Any = sorted({name.rpartition(".")[2] for name in linears})
    if is_nested(plain.config):  # in a vision tower too
        targets = rf"{path}\.{family.blocks}\..*\.({'|'.join(targets)})"
    nets = []
    for each in (model, plain):
        torch.manual_seed(1)
        config = peft.LoraConfig(
            task_type="CAUSAL_LM",
            r=2,
            lora_alpha=2 if experts else 8,  # of much, gpt_oss's gate makes 1e-4 of float32's rounding, in PEFT as here
            target_modules=targets,
            target_parameters=sorted(f"experts.{name}" for name in experts) or None,
            init_lora_weights=False,
        )
        nets.append(peft.get_peft_model(each, config).eval())
    for batch in _batches():
        real = batch["attention_mask"].bool()
        given, wanted = (_step(net, {**batch, "labels": batch["input_ids"].masked_fill(~real, -100)}) for net in nets)
        assert given["gradients"].keys() == wanted["gradients"].keys()
        assert len(wanted["gradients"]) >= 2 * 6, "a linear or more in each of six blocks"
        errors = {
            "logits": relative_error(given["logits"][real], wanted["logits"][real]),
            "loss": relative_error(given["loss"], wanted["loss"]),
            "input gradient": relative_error(given["input"], wanted["input"]),
            "LoRA gradients": max(
                relative_error(given["gradients"][name], gradient)
                for name, gradient in wanted["gradients"].items()
                if gradient.any()  # an expert's gate that nobody chose
            ),
        }
        worst = {name: max(worst[name], error) for name, error in errors.items()}
    return worst


def _step(net: Any, batch: dict[str, torch.Tensor]) -> dict[str, Any]:
    seen: list[torch.Tensor] = []

    def keep(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        seen.append(output.detach().requires_grad_())
        return seen[0]

    net.zero_grad()
    hook = net.get_base_model().get_input_embeddings().register_forward_hook(keep)
    output = net(**batch, use_cache=False)
    hook.remove()
    output.loss.backward()
    gradients = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
    return {
        "logits": output.logits.detach(),
        "loss": output.loss.detach(),
        "input": seen[0].grad,
        "gradients": gradients,
    }


def _hidden_states(model: Any, plain: Any) -> dict[str, float]:
    """At every block, and the gradient there of the last one's: output_hidden_states=True as the library has it."""
    batch, states, gradients = list(_batches())[1], [], []
    real = batch["attention_mask"].bool()
    for each in (model, plain):
        embeddings = each.get_input_embeddings()
        hook = embeddings.register_forward_hook(lambda module, args, output: output.requires_grad_())
        output = each(**batch, use_cache=False, output_hidden_states=True)
        hook.remove()
        states.append(output.hidden_states)
        last = output.hidden_states[-1][real]
        # Not a sum of squares: behind a norm that is a constant, and its gradient is rounding alone.
        weights = torch.linspace(-1, 1, last.numel()).reshape(last.shape)
        gradients.append(torch.autograd.grad((last * weights).sum(), output.hidden_states[2])[0])
    assert len(states[0]) == len(states[1]) == 7
    errors = [relative_error(given[real], wanted[real]) for given, wanted in zip(*states, strict=True)]
    return {"hidden states": max(*errors, relative_error(gradients[0][real], gradients[1][real]))}


def _equal_tokens(model: Any, plain: Any) -> float:
    """Greedy generation, without padding and with it on the left."""
    equal = []
    for batch in list(_batches())[:2]:
        options = {**batch, "max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
        with torch.no_grad():
            equal.append(model.generate(**options) == plain.generate(**options))
    return torch.stack(equal).float().mean().item()


def _classification(model: Any, folder: Path) -> float:
    """Logits, loss and the gradient of a new head, with padding on either side."""
    plain = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=LABELS).requires_grad_(False).eval()
    (name, head), *others = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    assert not others, "all but the new head is frozen"
    twin = plain.get_parameter(name).requires_grad_()
    twin.data.copy_(head)
    errors = []
    for batch in _batches():
        labels = torch.arange(ROWS) % LABELS
        given, wanted = (each(**batch, labels=labels) for each in (model, plain))
        pairs = [(given.logits, wanted.logits), (given.loss, wanted.loss)]
        pairs.append((torch.autograd.grad(given.loss, head)[0], torch.autograd.grad(wanted.loss, twin)[0]))
        errors += [relative_error(left, right) for left, right in pairs]
    return max(errors)
