"""A family's self-test: a tiny random model of its own config, swapped against plain, before anything is trained."""

from __future__ import annotations

import copy
import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from petals_tune.errors import UnsupportedModel
from petals_tune.model.block_lists import kinds_of_blocks
from petals_tune.model.families import (
    Family,
    PerBlock,
    empty_the_rest,
    family_of,
    load_part,
    placeholder_model,
    restore_counts,
    trimmed_class,
    trimmed_config,
    without_blocks,
)
from petals_tune.model.nested import decoder_of, decoder_path, is_nested, text_class, text_config
from petals_tune.remote.backbone import Backbone, Span
from petals_tune.remote.blocks import put_remote_blocks
from petals_tune.wire.span import BlockSpan

TOLERANCE = 1e-4  # of the largest value; float32, and what is wrong is wrong by much more
_BLOCKS, _MOST_BLOCKS = 4, 8
_VOCABULARY = 64
_MOST_PARAMETERS = 300_000_000
_ROWS, _POSITIONS = 2, 7
# Config keys of Mamba's heads; their number times their width is a multiple of the hidden size.
_MAMBA_HEADS = ("mamba_n_heads", "mamba_num_heads", "mamba_d_ssm")
_MAMBA_GROUPS = ("mamba_n_groups", "n_groups")
_passed: dict[tuple[Any, str], int] = {}  # what was tried in this process
_one_at_a_time = threading.Lock()
# What a model's code raises on a config that it does not expect.
_FAILURES = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


def self_test(model_class: Any, config: PretrainedConfig) -> int:
    """Return the length of the tuple that a layer of this family returns; 0 where it returns a tensor.

    Found on a tiny model, whose swapped twin must agree.

    The twin's blocks run in two parts, as servers build them; logits and the gradient at the embeddings are compared,
    with padding on either side. Raises UnsupportedModel with what differed or failed.
    """
    key = (model_class, config.to_json_string())
    with _one_at_a_time:  # it sets what the whole process shares
        if key not in _passed:
            _passed[key] = _run_guarded(model_class, config)
        return _passed[key]


def _run_guarded(model_class: Any, config: PretrainedConfig) -> int:
    threads = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(0)
        torch.set_num_threads(1)  # threads that wait for each other take longer than matrices of this size
        try:
            return _run(model_class, config)
        except _FAILURES as error:
            if isinstance(error, UnsupportedModel):
                raise
            text = str(error).strip().split("\n", 1)[0]
            raise UnsupportedModel(
                f"model_type={config.model_type!r}: a tiny model of this architecture does not run with its blocks "
                f"apart: {type(error).__name__}: {text}",
                model_type=config.model_type,
                reason="fails",
            ) from error
        finally:
            torch.set_num_threads(threads)


def _run(model_class: Any, config: PretrainedConfig) -> int:
    small = tiny(config)
    parameters = sum(parameter.numel() for parameter in placeholder_model(small).parameters())
    if parameters > _MOST_PARAMETERS:
        raise UnsupportedModel(
            f"model_type={config.model_type!r}: no small model of this architecture could be made to try it on; the "
            f"smallest found has {parameters:,} parameters",
            model_type=config.model_type,
            reason="size",
        )
    if is_nested(small):
        plain = load_part(text_class(model_class, small), copy.deepcopy(small), {}, dtype=torch.float32)[0].eval()
    else:
        plain = model_class(copy.deepcopy(small)).eval()
    for parameter in plain.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.02)  # nothing is at zero, where nobody would miss it
    embeddings: Any = plain.get_input_embeddings()
    embeddings.weight.data[0] = 0  # as some families have it whenever they are loaded
    decoder = decoder_of(plain)
    placeholder = placeholder_model(small)
    if type(decoder) is not type(placeholder):
        raise UnsupportedModel(
            f"model_type={config.model_type!r}: the text decoder of {model_class.__name__} is a "
            f"{type(decoder).__name__}, and servers would run a {type(placeholder).__name__}",
            model_type=config.model_type,
            reason="differs",
        )
    family = family_of(decoder)
    path = decoder_path(plain)
    family = replace(family, prefixes=(path,) if path else ())
    tuple_length = 0

    def look(block: nn.Module, args: Any, output: Any) -> None:
        nonlocal tuple_length
        tuple_length = len(output) if isinstance(output, tuple) else 0

    family.blocks_of(decoder)[0].register_forward_hook(look)
    crossings = _Crossings(config.model_type)
    for block in family.blocks_of(decoder):
        block.register_forward_pre_hook(crossings.check_input, with_kwargs=True)
        block.register_forward_hook(crossings.note_output)
    for side, mask in _masks().items():
        wanted = _plain_values(plain, mask, config)
        if side == "no":  # the first: now it is known what layers return
            swapped = swapped_twin(plain, small, family, tuple_length=tuple_length)
        given = _values(swapped, mask)
        for what, left, right in zip(("logits", "gradient at the embeddings"), given, wanted, strict=True):
            error = ((left - right).abs().max() / right.abs().max()).item()
            if not error <= TOLERANCE:
                raise UnsupportedModel(
                    f"model_type={config.model_type!r}: with its blocks apart and {side} padding, a tiny model of this "
                    f"architecture gives another {what}: {error:.1e} of the largest value where {TOLERANCE:g} would do",
                    model_type=config.model_type,
                    reason="differs",
                )
    return tuple_length


def _plain_values(plain: Any, mask: torch.Tensor, config: PretrainedConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """`_values` of the plain model. Raises UnsupportedModel where it does not run by itself."""
    try:
        return _values(plain, mask)
    except _FAILURES as error:
        if isinstance(error, UnsupportedModel):
            raise
        text = str(error).strip().split("\n", 1)[0]
        raise UnsupportedModel(
            f"model_type={config.model_type!r}: a tiny model of this config does not run on text alone: "
            f"{type(error).__name__}: {text}",
            model_type=config.model_type,
            reason="config",
        ) from error


class _Crossings:
    """Watches what passes from block to block: servers are sent hidden states (B, S, H) alone."""

    def __init__(self, model_type: str):
        self._model_type = model_type
        self._made: list[torch.Tensor] = []  # by earlier blocks, beside hidden states

    def check_input(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Raises UnsupportedModel where a block needs more than hidden states of the block before it."""
        hidden = args[0] if args else kwargs["hidden_states"]
        if hidden.dim() != 3:
            raise self._refusal("streams", f"hidden states of the shape {tuple(hidden.shape)} pass between its blocks")
        for value in (*args[1:], *kwargs.values()):
            if any(value is made for made in self._made):
                raise self._refusal("shared", "a block is given what an earlier block made beside hidden states,")

    def note_output(self, block: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, tuple):
            self._made += [each for each in output[1:] if isinstance(each, torch.Tensor)]

    def _refusal(self, reason: str, what: str) -> UnsupportedModel:
        return UnsupportedModel(
            f"model_type={self._model_type!r}: {what} and servers are sent hidden states (rows, positions, width)",
            model_type=self._model_type,
            reason=reason,
        )


def _values(model: PreTrainedModel, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The logits where `mask` is real, and the gradient of a weighted sum of them at the embeddings' output."""
    ids = torch.arange(mask.numel()).reshape(mask.shape) % (_VOCABULARY - 3) + 3
    seen: list[torch.Tensor] = []

    def keep(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        seen.append(output.detach().requires_grad_())
        return seen[0]

    hook = model.get_input_embeddings().register_forward_hook(keep)
    try:
        output = model(input_ids=ids, attention_mask=mask, use_cache=False)
    finally:
        hook.remove()
    logits = output[0]
    logits = logits[mask.bool()] if logits.dim() == 3 else logits
    weights = torch.linspace(-1, 1, logits.numel()).reshape(logits.shape)
    (logits * weights).sum().backward()
    grad = seen[0].grad
    assert grad is not None
    return logits.detach(), grad


def _masks() -> dict[str, torch.Tensor]:
    full = torch.ones(_ROWS, _POSITIONS, dtype=torch.int64)
    left = full.clone()
    left[1, :3] = 0
    return {"no": full, "left": left, "right": left.flip(1)}


class _LocalBackbone(Backbone):
    """Runs the blocks here, as servers run theirs."""

    parts: Sequence[tuple[BlockSpan, PreTrainedModel]]

    def run(
        self,
        span: Span,
        hidden: torch.Tensor,
        padding: torch.Tensor | None,
        positions: torch.Tensor | None,
        prompts: torch.Tensor | None = None,
    ) -> torch.Tensor:
        assert prompts is None, "the self-test gives none, and here nothing adds them"
        options = {} if positions is None else {"position_ids": positions}
        mask = None if padding is None else padding.long()
        for _, part in self.parts:
            hidden = part(inputs_embeds=hidden, attention_mask=mask, use_cache=False, **options).last_hidden_state
        return hidden


def swapped_twin(plain: Any, config: PretrainedConfig, family: Family, *, tuple_length: int) -> Any:
    """The model of `plain`, taken apart as clients and servers do it, in two parts, and put together again."""
    tensors = plain.state_dict()
    outside = {name: tensor for name, tensor in tensors.items() if family.block_index(name) is None}
    twin = without_blocks(type(plain), config, outside, torch.float32)
    placeholder = placeholder_model(config)
    per_block = PerBlock.of(placeholder.config, family.total_blocks)
    middle = family.total_blocks // 2
    parts = []
    for span in (BlockSpan(0, middle), BlockSpan(middle, family.total_blocks)):
        found = {
            f"{family.blocks}.{block - span.start}.{family.inside(name)}": tensor
            for name, tensor in tensors.items()
            if (block := family.block_index(name)) is not None and block in span
        }
        part, _ = load_part(
            trimmed_class(placeholder, family, span), trimmed_config(placeholder), found, dtype=torch.float32
        )
        per_block.write(part.config, span)
        restore_counts(family.owner(part), family.owner(placeholder))
        empty_the_rest(part, family)
        parts.append((span, part))
    backbone = _LocalBackbone(chain=None, tuple_length=tuple_length)  # type: ignore[arg-type]  # it has no network
    backbone.parts = parts
    put_remote_blocks(twin, family, placeholder, backbone)
    return twin


def tiny(config: PretrainedConfig) -> PretrainedConfig:
    """A small model of the same family: the same kinds of blocks, fewer and narrower.

    The width of a head stays as it is, since other sizes are derived from it.
    """
    small = copy.deepcopy(config)
    text = text_config(small)
    _shrink(text)
    if text is not small:
        for name, value in vars(small).items():
            if isinstance(value, int) and name.endswith(("_token_id", "_token_index")):
                setattr(small, name, _VOCABULARY - 1)  # of an image: none that the text of the test has
    return small


def _shrink(config: PretrainedConfig) -> None:
    """Write smaller sizes into the config of a text model."""
    own = dict(vars(config))
    total = config.num_hidden_layers
    per_block = [name for name, value in own.items() if isinstance(value, list) and len(value) == total]
    differing = [kinds_of_blocks(config) or [""] * total, *(own[name] for name in per_block)]
    kinds = list(zip(*(map(str, values) for values in differing), strict=True))
    enough = (n for n in range(_BLOCKS, _MOST_BLOCKS) if set(kinds[:n]) == set(kinds))
    blocks = min(next(enough, _MOST_BLOCKS), total)
    heads = config.num_attention_heads
    head_width = own.get("head_dim") or config.hidden_size // heads  # where blocks differ, that of most
    config.num_hidden_layers = blocks
    for name in per_block:
        setattr(config, name, own[name][:blocks])
    config.num_attention_heads = min(2, heads)
    config.hidden_size = config.num_attention_heads * head_width
    config.vocab_size = _VOCABULARY
    config.pad_token_id = 0  # classifiers take no batches without one
    for name, value in own.items():
        if isinstance(value, bool) or not isinstance(value, int):
            continue
        if "intermediate" in name or "ffn" in name or name == "n_inner":
            setattr(config, name, 2 * head_width)
        elif "kv_head" in name or "key_value_head" in name:
            setattr(config, name, config.num_attention_heads if value == heads else 1)
        elif "vocab_size" in name:
            setattr(config, name, _VOCABULARY)
        elif "experts" in name and "tok" not in name:
            setattr(config, name, min(value, 16))
        elif name in _MAMBA_HEADS:
            setattr(config, name, value * config.hidden_size // own["hidden_size"])
        elif name in _MAMBA_GROUPS:
            setattr(config, name, 1)
        elif name.endswith("_token_id"):
            setattr(config, name, value % 3)
        elif name == "sliding_window":
            setattr(config, name, 3)  # shorter than the text of the test
