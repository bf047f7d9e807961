"""Arguments of a call of the model: what of them remote blocks are given, and what is refused by its name.

Shapes: B rows, S positions.
"""

from __future__ import annotations

import re
from typing import Any

import torch

from petals_tune.copies import to_host
from petals_tune.errors import ConfigError

# What a module that loops over blocks may be given: what it uses itself, what `RemoteBlocks` handles, and arguments of
# the loss, which heads hand down. transformers 5 ignores cache_position.
_KNOWN = frozenset(
    {
        *("input_ids", "inputs_embeds", "token_type_ids", "attention_mask", "position_ids", "past_key_values"),
        *("use_cache", "cache_position", "output_hidden_states", "return_dict"),
        *("num_items_in_batch", "shift_labels", "ignore_index", "logits_to_keep", "labels"),
    }
)
# Of tokens in a multimodal model: 0 for text.
_TOKEN_KINDS = frozenset({"token_type_ids", "mm_token_type_ids"})
# Config keys of the token that stands where an image or sound goes.
_PLACEHOLDER = re.compile(r"(image|video|audio|speech|media)_(soft_)?token_(id|index)|(image|video)_placeholder_id")
# What servers could not give back, also where the config asks for it.
_NOT_SENT = {"output_attentions": "attention weights", "output_router_logits": "router logits"}


def check_arguments(config: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raises ConfigError for an argument that concerns the blocks and would not reach them."""
    if len(args) > 1:
        raise ConfigError(
            "call the base model of remote blocks with keyword arguments (input_ids may be positional)",
            key="input_ids",
        )
    for name, what in _NOT_SENT.items():
        if option(config, kwargs, name):
            raise ConfigError(f"{name}: servers do not send {what}; leave it False", key=name)
    for name, value in kwargs.items():
        if name not in _KNOWN and value is not None and value is not False:
            raise ConfigError(f"{name}: remote blocks do not know this argument", key=name, seen=value)


def check_text_alone(config: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raises ConfigError for what a multimodal model of `config` is given beside text: images, sound, their tokens."""
    for name, value in kwargs.items():
        if name in _TOKEN_KINDS and value is not None and bool(value.any()):
            raise _not_text(f"{name}: tokens of an image or of sound", name)
        if isinstance(value, torch.Tensor) and name not in _KNOWN | _TOKEN_KINDS:
            raise _not_text(name, name)
    ids = args[0] if args else kwargs.get("input_ids")
    if ids is None:
        return
    for name, value in vars(config).items():
        if _PLACEHOLDER.fullmatch(name) and isinstance(value, int) and bool((ids == value).any()):
            raise _not_text(f"the token {value}, which is the config's {name}", "input_ids")


def _not_text(what: str, key: str) -> ConfigError:
    return ConfigError(
        f"{what}: of a multimodal model, remote blocks run the text alone; pass text without images, sound and video",
        key=key,
    )


def shape_of_text(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Size:
    """(B, S, ...) of the token ids or embeddings of a call. Raises ConfigError where there are none."""
    given = (*args, kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
    text = next((each for each in given if each is not None), None)
    if text is None:
        raise ConfigError("give the model input_ids or inputs_embeds", key="input_ids")
    return text.shape


def option(config: Any, kwargs: dict[str, Any], name: str) -> Any:
    """Return an argument of a call, or where it is not given, the config's value."""
    value = kwargs.get(name)
    return getattr(config, name, False) if value is None else value


def text_positions(given: torch.Tensor | None) -> torch.Tensor | None:
    """(B or 1, S) int64, also of (3 or 4, B, S): of text, positions are the same in each of three dimensions.

    Raises ConfigError for another shape, and for positions of an image.
    """
    if given is not None and given.dim() == 3:
        if not bool((given == given[:1]).all()):
            raise _not_text("position_ids: positions that differ by dimension", "position_ids")
        given = given[0]
    return position_ids(given)


def position_ids(given: torch.Tensor | None) -> torch.Tensor | None:
    """(B or 1, S) int64. Raises ConfigError for another shape."""
    if given is None:
        return None
    if given.dim() != 2:
        text = f"position_ids: (B or 1, S) is needed, not {tuple(given.shape)}"
        raise ConfigError(text, key="position_ids", seen=tuple(given.shape))
    return given.long()


def padding(
    mask: Any, shape: torch.Size, positions: torch.Tensor | None = None, *, past: int = 0, packs: bool = True
) -> torch.Tensor | None:
    """(B, past + S) bool, True = attend, of the 2-D `mask` for a text of `shape` (B, S, ...); None: it hides nothing.

    It is in host memory, to be looked at and sent. Without a mask, transformers takes positions that do not count up by
    one for several texts in a row, which do not see each other, if the model `packs`: if it has no cache. So a mask
    that hides nothing is returned where that would be wrong. Raises ConfigError for a mask of another shape.
    """
    wanted = (shape[0], past + shape[1])
    if mask is None:
        return None if packs or not _jump(positions) else torch.ones(wanted, dtype=torch.bool)
    if not isinstance(mask, torch.Tensor) or tuple(mask.shape) != wanted:
        seen = tuple(getattr(mask, "shape", ())) or type(mask).__name__
        what = f", for the {past} positions of the session and these" if past else ""
        raise ConfigError(
            f"attention_mask: a 2-D mask of shape {wanted} is needed{what}, not {seen}", key="attention_mask", seen=seen
        )
    (real,) = to_host(mask.bool())
    return None if bool(real.all()) and not _jump(positions) else real


def _jump(positions: torch.Tensor | None) -> bool:
    return positions is not None and bool((positions.diff(dim=1) != 1).any())
