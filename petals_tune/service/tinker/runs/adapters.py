"""Trained adapters of a model with remote blocks, as runs and sampling sessions need them.

Thread-safe: an adapter is an argument of a call, and each has its own PeftModel. Shapes: B texts, S positions,
H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from peft import PeftModel
from peft.utils import get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from petals_tune.errors import ConfigError, DataError
from petals_tune.remote.adapters.registry import resolved
from petals_tune.service.tinker.records import LoRA
from petals_tune.service.tinker.runs.targets import lora_config
from petals_tune.service.tinker.wire import Datum
from petals_tune.train.chunked_loss import (
    PROBE_SCALE,
    LogitFunction,
    chunk_length,
    chunked_logprobs,
    functions_after_head,
)

MOST_POSITIONS = 8192  # of texts that are computed at once, padding included

Top = list[list[tuple[int, float]]]  # for each position, tokens and their log-probabilities


class RemoteAdapters:
    """The adapters in the registry of a model of `from_pretrained`."""

    def __init__(self, model: Any):
        self._model = model
        self._after_head: LogitFunction | None = None  # once it is known

    def create(self, adapter: str, lora: LoRA) -> None:
        """Make a new adapter, with the values that stock PEFT draws from the same seed.

        Raises ConfigError where nothing would be trained, UnsupportedAdapter where blocks on servers cannot honour it.
        """
        generator = torch.Generator()
        generator.seed() if lora.seed is None else generator.manual_seed(lora.seed)
        with _DrawnFrom(generator):
            self._model.adapters.add(adapter, lora_config(self._model, lora))

    def parameters(self, adapter: str) -> dict[str, nn.Parameter]:
        """Trained tensors, by names that do not depend on the adapter's."""
        net: PeftModel = self._model.adapters[adapter]
        return {name: each for name, each in net.named_parameters() if each.requires_grad}

    def score(
        self,
        adapter: str,
        data: Sequence[Datum],
        loss_of: Callable[[int, Tensor], Tensor],
        *,
        backward: bool,
    ) -> list[Tensor]:
        """Return log-probabilities (S,) of the targets of each text.

        With `backward`, adds the gradient of the sum of the losses to those of the adapter. `loss_of` is given the
        number of a text and its log-probabilities (S,), and returns its loss (). Texts of like length are computed
        together, MOST_POSITIONS at once; where servers take them in smaller parts, each part goes back as soon as it
        arrives. Raises DataError for a token that the model does not have.
        """
        self._check_tokens(data)
        found: list[Tensor] = [torch.empty(0)] * len(data)
        for rows in batches([len(datum.ids) for datum in data], MOST_POSITIONS):
            ids, mask, targets = _padded([data[row] for row in rows])

            def loss_of_part(
                start: int, stop: int, rows: list[int] = rows, inputs: tuple[Tensor, ...] = (ids, mask, targets)
            ) -> Tensor:
                part = self._logprobs(adapter, *(each[start:stop] for each in inputs))
                own = [each[: len(data[row].ids)] for row, each in zip(rows[start:stop], part, strict=True)]
                for row, each in zip(rows[start:stop], own, strict=True):
                    found[row] = each.detach()
                return torch.stack([loss_of(row, each) for row, each in zip(rows[start:stop], own, strict=True)]).sum()

            with torch.set_grad_enabled(backward):
                loss = self._interleaved(adapter, ids, mask, loss_of_part) if backward else None
                loss = loss_of_part(0, len(rows)) if loss is None else loss
            if backward:
                loss.backward()
        return found

    def prompt_logprobs(self, adapter: str | None, ids: Sequence[int], top: int) -> tuple[list[float], Top]:
        """Log-probabilities of `ids` from the second one on, and the `top` most likely tokens there."""
        tokens, rows = torch.tensor([list(ids)]), []
        found: list[float] = []
        with torch.inference_mode():
            head, after, hidden, vocabulary = self._before_head(adapter, tokens, torch.ones_like(tokens))
            chunk = chunk_length(vocabulary)
            for part, own in zip(hidden[0, :-1].split(chunk), tokens[0, 1:].split(chunk), strict=True):
                logprobs = after(head(part)).float().log_softmax(-1)
                found += logprobs.gather(1, own[:, None]).flatten().tolist()
                values, likely = logprobs.topk(top)
                rows += [list(zip(*pair, strict=True)) for pair in zip(likely.tolist(), values.tolist(), strict=True)]
        return found, rows

    def save(self, adapter: str, partial: Path) -> None:
        """Save an adapter in PEFT's format, which stock PEFT loads over the plain model, into a folder being filled."""
        # "auto" would save the whole head beside its LoRA.
        self._model.adapters[adapter].save_pretrained(str(partial), save_embedding_layers=False)

    def load(self, adapter: str, folder: Path) -> None:
        """Put the tensors of a saved adapter into this one. Raises ConfigError where they are damaged or do not fit."""
        net: PeftModel = self._model.adapters[adapter]
        name = net.active_adapter
        try:
            weights = load_peft_weights(str(folder), device="cpu")
        except (OSError, ValueError, SafetensorError) as error:
            raise ConfigError(f"the adapter of this checkpoint cannot be read: {error}", key="path") from None
        own = get_peft_model_state_dict(net, adapter_name=name, save_embedding_layers=False)
        differ = [key for key in own.keys() | weights.keys() if _shape(own, key) != _shape(weights, key)]
        if differ:
            raise ConfigError(
                f"the checkpoint is of another adapter: {sorted(differ)[:2]}", key="path", seen=sorted(differ)
            )
        set_peft_model_state_dict(net, weights, adapter_name=name)

    def load_for_sampling(self, adapter: str, folder: Path) -> None:
        """Load a saved adapter that is not trained any more."""
        self._model.adapters.load(adapter, folder)

    def remove(self, adapter: str) -> None:
        """Forget an adapter; calls in progress keep it."""
        self._model.adapters.remove(adapter)

    def _check_tokens(self, data: Sequence[Datum]) -> None:
        known = {
            "model_input": self._model.get_input_embeddings().weight.shape[0],
            "target_tokens": self._model.config.get_text_config().vocab_size,
        }
        for datum in data:
            for name, tokens in (("model_input", datum.ids), ("target_tokens", datum.targets)):
                if tokens and not 0 <= min(tokens) <= max(tokens) < known[name]:
                    wrong = max(tokens) if min(tokens) >= 0 else min(tokens)
                    raise DataError(
                        f"{name}: this model has {known[name]} tokens, and none is {wrong}", column=name, seen=wrong
                    )

    def _interleaved(
        self, adapter: str, ids: Tensor, mask: Tensor, loss_of_part: Callable[[int, int], Tensor]
    ) -> Tensor | None:
        """Return the loss () of texts whose parts go there and back one by one; None: they are computed at once."""
        net: PeftModel = self._model.adapters[adapter]
        blocks: Any = net.get_base_model().remote_blocks
        if not blocks.can_interleave(*ids.shape, ids.device):
            return None
        step = blocks.interleaved(loss_of_part, net.parameters())
        loss: Tensor | None = step.run(
            lambda: self._model(input_ids=ids, attention_mask=mask, use_cache=False, adapter=adapter)
        )
        return loss

    def _logprobs(self, adapter: str, ids: Tensor, mask: Tensor, targets: Tensor) -> Tensor:
        """Return the (B, S) log-probabilities of the targets; what is padding has some too."""
        head, after, hidden, vocabulary = self._before_head(adapter, ids, mask)
        found = chunked_logprobs(head, after, hidden.flatten(0, 1), targets.flatten(), vocabulary=vocabulary)
        return found.view_as(targets)

    def _before_head(
        self, adapter: str | None, ids: Tensor, mask: Tensor
    ) -> tuple[nn.Module, LogitFunction, Tensor, int]:
        """Return the head, what the model does with its output, the head's input (B, S, H), and V.

        The model's own forward gets one large position to its head, which shows what the family does with logits.
        Raises ConfigError where that is nothing known.
        """
        view, base = resolved(self._model, adapter)
        head = base.get_output_embeddings()
        forward = head.forward
        captured: list[Tensor] = []

        def capture(hidden: Tensor) -> Tensor:
            logits: Tensor = forward(PROBE_SCALE * hidden[:1, :1].detach())
            captured[:] = hidden, logits.detach().clone()  # some models change their logits in place
            return logits

        head.forward = capture  # of this view, which is of this call alone
        logits = view(input_ids=ids, attention_mask=mask, use_cache=False).logits
        del head.forward
        hidden, raw = captured
        if self._after_head is None:
            for after in functions_after_head(base.config.get_text_config()):
                if torch.allclose(after(raw), logits, rtol=0, atol=0, equal_nan=True):
                    self._after_head = after
                    break
            else:
                raise ConfigError(
                    f"{type(base).__name__} does something with its logits that is not known here, so that its "
                    "log-probabilities would be wrong",
                    key="model",
                    seen=type(base).__name__,
                )
        return head, self._after_head, hidden, logits.shape[-1]


class _DrawnFrom(TorchFunctionMode):
    """In this thread, random initial values come from `generator`: other threads use the process's one meanwhile."""

    _FILLS: ClassVar = {
        *(Tensor.uniform_, Tensor.normal_),
        *(nn.init.uniform_, nn.init.normal_, nn.init.kaiming_uniform_, nn.init.kaiming_normal_),
    }

    def __init__(self, generator: torch.Generator):
        super().__init__()
        self._generator = generator

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = dict(kwargs or {})
        if func in self._FILLS and options.get("generator") is None:
            options["generator"] = self._generator
        return func(*args, **options)


def batches(lengths: Sequence[int], most_positions: int) -> Iterator[list[int]]:
    """Yield numbers of texts that are computed together, the shortest first: with padding `most_positions` or fewer.

    A text that is longer is alone.
    """
    rows: list[int] = []
    for row in sorted(range(len(lengths)), key=lambda row: lengths[row]):
        if rows and lengths[row] * (len(rows) + 1) > most_positions:
            yield rows
            rows = []
        rows.append(row)
    if rows:
        yield rows


def _padded(data: Sequence[Datum]) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, mask and targets (B, S), padded at the end."""
    longest = max(len(datum.ids) for datum in data)
    ids, mask, targets = (torch.zeros(len(data), longest, dtype=torch.int64) for _ in range(3))
    for row, datum in enumerate(data):
        ids[row, : len(datum.ids)] = torch.tensor(datum.ids)
        mask[row, : len(datum.ids)] = 1
        targets[row, : len(datum.ids)] = torch.tensor(datum.targets)
    return ids, mask, targets


def _shape(tensors: dict[str, Tensor], name: str) -> tuple[int, ...] | None:
    return tuple(tensors[name].shape) if name in tensors else None
