"""Calls with one adapter for each row: rows of equal adapters go together, and the outputs in the order of the rows.

Shapes: B rows, T text tokens.
"""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from typing import Any, TypeVar

import torch
from peft import PeftModel

from petals_tune.errors import ConfigError
from petals_tune.remote.adapters.registry import resolved

T = TypeVar("T")

# Of a call, arguments with one row for each text.
_ROWS = ("input_ids", "attention_mask", "position_ids", "token_type_ids", "labels")
_NOT_BY_ROW = ("past_key_values", "output_hidden_states", "shift_labels", "adapter_names")
_NOT_GENERATED_BY_ROW = ("past_key_values", "streamer", "return_dict_in_generate", "assistant_model", "inputs_embeds")


def call_by_row(model: Any, adapters: Sequence[str | None], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The output of `model` for rows of which each has its adapter; differentiable in each of them.

    Groups of equal adapters run at the same time, or one after the other where the model draws random numbers, which
    come from one generator: where it is in training mode.
    """
    _refuse(kwargs, _NOT_BY_ROW, "call the model once for each adapter")
    if kwargs.get("use_cache") or kwargs.get("return_dict") is False:
        text = (
            "adapters: a call with one adapter for each row has no cache and returns a dict; leave these arguments out"
        )
        raise ConfigError(text, key="use_cache" if kwargs.get("use_cache") else "return_dict")
    if len(args) > 1:
        raise ConfigError("with adapters, give all arguments by name but input_ids", key="input_ids")
    kwargs = {**kwargs, **dict(zip(("input_ids",), args, strict=False))}
    groups, ids = _groups(adapters, kwargs.get("input_ids")), kwargs["input_ids"]
    views = [resolved(model, name)[0] for name in groups]
    parts = [_cut(kwargs, rows, len(ids)) for rows in groups.values()]
    calls = [partial(view, **part) for view, part in zip(views, parts, strict=True)]
    one_by_one = model.training or any(view.training for view in views)
    outputs = [call() for call in calls] if one_by_one else _at_once(calls)
    order = _order(groups.values(), ids.device)
    joined = {}
    for name, value in outputs[0].items():
        if isinstance(value, torch.Tensor) and name != "loss":
            each = [output[name] for output in outputs]
            if value.dim() == 3:  # by positions
                each = [tensor[:, -ids.shape[1] :] for tensor in each]
            joined[name] = torch.cat(each)[order.to(value.device)]
    if "loss" in outputs[0]:
        joined["loss"] = _loss(outputs, views, parts)
    return type(outputs[0])(**joined)


def generate_by_row(model: Any, adapters: Sequence[str | None], inputs: Any, options: dict[str, Any]) -> torch.Tensor:
    """Tokens (B x returned sequences, longest) of `model.generate`, a session for each group of equal adapters.

    Groups step at the same time, so that servers compute their tokens together; sampling goes one group after the
    other, since tokens are drawn from one generator.
    """
    instead = "call generate(..., adapter=NAME) once for each adapter"
    if options.get("draft") not in (None, "none"):
        raise ConfigError(f"adapters: drafts are made for one row; {instead}", key="draft")
    _refuse(options, _NOT_GENERATED_BY_ROW, instead)
    if model._active_session is not None:
        raise ConfigError(f"adapters: an open session is of one adapter; leave its block, or {instead}", key="adapters")
    if inputs is not None:
        options = {**options, "input_ids": inputs}
    ids: Any = options.get("input_ids")
    config = options.get("generation_config") or model.generation_config
    groups = _groups(adapters, ids)

    def option(name: str, default: Any) -> Any:
        found = options.get(name, getattr(config, name, None))
        return default if found is None else found

    if option("return_dict_in_generate", False):
        raise ConfigError(f"adapters: return_dict_in_generate is for one adapter; {instead}", key="adapters")
    calls = []
    for name, rows in groups.items():
        calls.append(partial(model.generate, adapter=name, **_cut(options, rows, len(ids))))
    outputs = [call() for call in calls] if option("do_sample", False) else _at_once(calls)
    longest = max(output.shape[1] for output in outputs)
    if any(output.shape[1] < longest for output in outputs):
        end = option("eos_token_id", 0)
        filler = option("pad_token_id", end[0] if isinstance(end, list) else end)
        outputs = [
            torch.nn.functional.pad(output, (0, longest - output.shape[1]), value=int(filler)) for output in outputs
        ]
    return torch.cat(outputs)[_order(groups.values(), outputs[0].device, option("num_return_sequences", 1))]


def _groups(adapters: Sequence[str | None], ids: Any) -> dict[str | None, list[int]]:
    """The rows of each adapter. Raises ConfigError where there is not one name for each row of `ids`."""
    if isinstance(adapters, str) or not isinstance(ids, torch.Tensor) or len(adapters) != len(ids) or not len(ids):
        rows = "no input_ids" if not isinstance(ids, torch.Tensor) else f"{len(ids)} rows"
        raise ConfigError(
            f"adapters: one name, or None, for each row of input_ids is needed, not {adapters!r} for {rows}",
            key="adapters",
            seen=adapters,
        )
    groups: dict[str | None, list[int]] = {}
    for row, name in enumerate(adapters):
        groups.setdefault(name, []).append(row)
    return groups


def _cut(kwargs: dict[str, Any], rows: list[int], count: int) -> dict[str, Any]:
    """The arguments of `rows` alone, of `count`."""
    return {
        name: value[torch.tensor(rows, device=value.device)]
        if name in _ROWS and isinstance(value, torch.Tensor) and len(value) == count
        else value
        for name, value in kwargs.items()
    }


def _order(groups: Any, device: torch.device, copies: int = 1) -> torch.Tensor:
    """Where each row is among the rows of all groups, one after the other; `copies` of each row."""
    placed = torch.tensor([row * copies + copy for rows in groups for row in rows for copy in range(copies)])
    return placed.argsort().to(device)


def _loss(outputs: Sequence[Any], views: Sequence[Any], parts: Sequence[dict[str, Any]]) -> torch.Tensor:
    """The loss of all rows, of the losses of their groups: means over supervised tokens, or over rows."""
    if parts[0].get("num_items_in_batch") is not None:  # they are sums over this number
        return sum((output.loss for output in outputs[1:]), start=outputs[0].loss)
    counts = [
        _supervised(output, view, part["labels"]) for output, view, part in zip(outputs, views, parts, strict=True)
    ]
    losses = [(output.loss, count) for output, count in zip(outputs, counts, strict=True) if count]
    if not losses:
        return outputs[0].loss
    weighted = [loss * (count / sum(counts)) for loss, count in losses]
    return sum(weighted[1:], start=weighted[0])


def _supervised(output: Any, view: Any, labels: torch.Tensor) -> int:
    """How many tokens, or rows, the loss of a group is the mean of."""
    if output.logits.dim() != 3:
        return int((labels != -100).sum()) if labels.dim() == 1 and not labels.is_floating_point() else len(labels)
    prompted = isinstance(view, PeftModel) and view.active_peft_config.is_prompt_learning
    return int((labels if prompted else labels[:, 1:]).ne(-100).sum())  # after a prompt, the first token counts too


def _refuse(kwargs: dict[str, Any], names: Sequence[str], instead: str) -> None:
    """Raises ConfigError for an argument that has no meaning with one adapter for each row."""
    for name in names:
        if (value := kwargs.get(name)) is not None and value is not False:
            raise ConfigError(f"adapters: {name} is for one adapter; {instead}", key=name)


def _at_once(calls: Sequence[Callable[[], T]]) -> list[T]:
    """The results of `calls`, each in a thread with this one's gradient mode and autocast."""
    if len(calls) == 1:
        return [calls[0]()]
    grad, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    casts = [(kind, torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)]

    def run(call: Callable[[], T]) -> T:
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(inference))
            stack.enter_context(torch.set_grad_enabled(grad))
            for kind, dtype in casts:
                stack.enter_context(torch.autocast(kind, dtype=dtype))
            return call()

    with ThreadPoolExecutor(len(calls), "adapters") as pool:
        return [done.result() for done in [pool.submit(contextvars.copy_context().run, run, call) for call in calls]]
