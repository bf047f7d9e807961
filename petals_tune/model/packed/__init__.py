"""Registry of packed formats: checkpoints as they are published, read as if they were stored in full.

To add a format: write its class, and list it here. What transformers or others can store beside these is refused by
name: numbers that were unpacked by a wrong formula would have the right shapes.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from transformers import PretrainedConfig

from petals_tune.errors import UnsupportedModel
from petals_tune.model.packed.awq import AWQ
from petals_tune.model.packed.base import PackedFormat, PackedTensor
from petals_tune.model.packed.bnb import BitsAndBytes
from petals_tune.model.packed.compressed_tensors import CompressedTensors
from petals_tune.model.packed.fp8 import FP8
from petals_tune.model.packed.gptq import GPTQ
from petals_tune.model.packed.mxfp4 import MXFP4

FORMATS: dict[str, type[PackedFormat]] = {
    each.method: each for each in (AWQ, BitsAndBytes, CompressedTensors, FP8, GPTQ, MXFP4)
}
FORMATS["mxfp8"] = FP8  # its blocks are 1 x 32, and its scales bytes

# Ends of stored names that tell a packed weight where config.json has no `quantization_config`.
_MARKS = ("_scale_inv", "_proj_blocks", ".weight_packed", ".weight_scale", ".qweight", ".SCB", ".absmax")

# Families whose weights are stored (in, out), which packers of linears turn round or do not.
_TRANSPOSED = {"gpt2", "openai-gpt", "imagegpt", "decision_transformer"}


def take_quantization(config: PretrainedConfig) -> dict[str, Any] | None:
    """Remove `quantization_config` from `config` and return it: weights are unpacked here, not by transformers."""
    parts = [config, *(part for part in vars(config).values() if isinstance(part, PretrainedConfig))]
    found = [options for part in parts if (options := vars(part).pop("quantization_config", None))]
    return next((options if isinstance(options, dict) else options.to_dict() for options in found), None)


def find_format(options: dict[str, Any] | None, config: PretrainedConfig, source: str) -> PackedFormat | None:
    """Return the format of a `quantization_config`; None without one. Raises UnsupportedModel for an unknown one."""
    if options is None:
        return None
    method = str(options.get("quant_method") or ("bitsandbytes" if _is_bitsandbytes(options) else "")).lower()
    known = ", ".join(sorted(FORMATS))
    if method not in FORMATS:
        reason = f"{method!r} is not one of {known}"
    elif method in (GPTQ.method, AWQ.method, BitsAndBytes.method) and config.model_type in _TRANSPOSED:
        reason = f"{method} of model_type={config.model_type!r} does not say which way round its weights are"
    else:
        try:
            return FORMATS[method](options)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            reason = f"{method} with {error}"
    raise UnsupportedModel(
        f"{source} is stored in a format that cannot be read: quant_method {reason}; name the same model in full "
        f"(bfloat16), or in one of {known}, with model.source=FOLDER_OR_HUB_NAME",
        source=source,
        file="config.json",
        key="model.source",
        seen=method,
        model_type=config.model_type,
    )


def check_unpacked(names: Iterable[str], source: str) -> None:
    """Raise UnsupportedModel where names of tensors tell of packed weights, of which config.json does not."""
    marked = next((name for name in names if name.endswith(_MARKS)), None)
    if marked is not None:
        raise UnsupportedModel(
            f"{source} has packed weights ({marked}), and config.json has no quantization_config that says how: name "
            "the folder that they are from (transformers packs the weights of a model that it unpacked again where it "
            "saves it, and drops that part of the config)",
            source=source,
            file="config.json",
            key="model.source",
            seen=marked,
        )


def _is_bitsandbytes(options: dict[str, Any]) -> bool:
    return bool(options.get("load_in_8bit") or options.get("load_in_4bit"))


__all__ = ["FORMATS", "PackedFormat", "PackedTensor", "check_unpacked", "find_format", "take_quantization"]
