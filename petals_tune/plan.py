"""Say what a model takes: python -m petals_tune.plan model=NAME_OR_FOLDER memory=24GB:12,80GB:2"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Annotated

import hydra
from omegaconf import DictConfig, OmegaConf
from pydantic import Field

from petals_tune.cli import quiet_libraries, report_errors
from petals_tune.config import Model, check_arguments, folder_of
from petals_tune.errors import ConfigError

if TYPE_CHECKING:
    from petals_tune.blocks.sizes import ModelSizes

CONFIG_NAME = "plan"
QUANTIZATIONS = ("none", "int8", "nf4")
_GB = 2**30
_WORD = re.compile(r"(?P<gb>\d+(\.\d+)?)(GB|GiB|G)?(:(?P<count>\d+))?", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Options:
    """All options of a plan; conf/plan.yaml documents them."""

    model: Model
    memory: str | None
    rows: Annotated[int, Field(ge=1)]
    positions: Annotated[int, Field(ge=1)]
    lora_r: Annotated[int, Field(ge=1)]


@dataclass(frozen=True, kw_only=True)
class Machines:
    """Machines with equally much free memory."""

    gb: float
    count: int

    def __str__(self) -> str:
        return f"{self.count} x {self.gb:g} GB"


def main() -> None:
    """python -m petals_tune.plan model=NAME_OR_FOLDER memory=24GB:12,80GB:2 [key=value ...]"""
    quiet_libraries()
    sys.argv[1:] = arguments = with_plain_values(sys.argv[1:])
    with report_errors():
        check_arguments(arguments, config_name=CONFIG_NAME, schema=Options)
        plan()


def with_plain_values(arguments: Sequence[str]) -> list[str]:
    """Write `model=FOLDER` as `model.source=FOLDER`, and quote what Hydra would take for a sweep."""
    names = {path.stem for path in (folder_of("conf") / "model").glob("*.yaml")}
    replaced = []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if key == "model" and equals and value not in names:
            key = "model.source"
        if key in ("model.source", "memory") and equals and not value.startswith(("'", '"')) and value != "null":
            value = "'" + value.replace("'", "\\'") + "'"
        replaced.append(f"{key}{equals}{value}")
    return replaced


@hydra.main(version_base="1.3", config_path=str(folder_of("conf")), config_name=CONFIG_NAME)
def plan(cfg: DictConfig) -> None:
    """Print the bytes of a block, of a step and of the client, and how many machines of each kind it takes."""
    with report_errors():
        machines = parse_memory(cfg.memory) if cfg.memory else []
        from petals_tune.blocks.loading import torch_dtype  # slow, as those below; a mistyped key should not wait
        from petals_tune.blocks.sizes import model_sizes
        from petals_tune.model.checkpoint import Checkpoint
        from petals_tune.model.convert import model_folder

        checkpoint = Checkpoint(str(model_folder(cfg.model.source)), revision=cfg.model.revision)
        dtype = torch_dtype("auto", checkpoint.config, "cuda")
        sizes = model_sizes(checkpoint.config, QUANTIZATIONS, dtype)
        for line in report(
            sizes,
            machines,
            name=f"{cfg.model.source} ({checkpoint.config.model_type})",
            dtype=str(dtype).removeprefix("torch."),
            itemsize=dtype.itemsize,
            rows=cfg.rows,
            positions=cfg.positions,
            lora_r=cfg.lora_r,
        ):
            print(line)


def parse_memory(text: str) -> list[Machines]:
    """Read "24GB:12,80GB:2": 12 machines of 24 GB and 2 of 80. Raises ConfigError."""
    machines = []
    for word in text.replace(" ", "").split(","):
        match = _WORD.fullmatch(word)
        if match is None or float(match["gb"]) == 0 or match["count"] == "0":
            raise ConfigError(
                f"memory={text!r}: {word!r} is not like 24GB or 24GB:12, which is 12 machines of 24 GB",
                key="memory",
                seen=text,
            )
        machines.append(Machines(gb=float(match["gb"]), count=int(match["count"] or 1)))
    return machines


def report(
    sizes: ModelSizes,
    machines: Sequence[Machines],
    *,
    name: str,
    dtype: str,
    itemsize: int,
    rows: int,
    positions: int,
    lora_r: int,
) -> Iterator[str]:
    """Yield the lines of a plan."""
    total = sizes.total_blocks
    yield f"{name}: {sizes.parameters / 1e9:.2f} billion parameters, {total} blocks, hidden size {sizes.hidden_size}"
    yield ""
    yield f"{'quantization':<18}{'one block':<26}{'all blocks':<12}" + "".join(
        f"{f'blocks in {each.gb:g} GB':<18}" for each in machines
    )
    for quantization, blocks in sizes.blocks.items():
        label = quantization if quantization != "none" else f"none ({dtype})"
        held = "".join(f"{blocks_held(blocks, sizes.loading_bytes, each.gb):<18}" for each in machines)
        yield f"{label:<18}{_describe(blocks):<26}{_gb(sum(blocks)):<12}{held}"
    if machines:
        yield ""
        for quantization, blocks in sizes.blocks.items():
            yield f"{quantization:<18}{verdict(blocks, sizes.loading_bytes, machines)}"
    yield ""
    hidden = sizes.hidden_size
    yield "on a client's line, each way, through one server; through k servers k times, or (k + 1) / 2 with hand-over"
    for words, size in ((dtype, itemsize), ("float32", 4)) if itemsize != 4 else (("float32", 4),):
        step = rows * positions * hidden * size
        yield (
            f"  {words:<10} a generated token {_bytes(hidden * size)}; a training step of {rows} x {positions} "
            f"positions {_bytes(step)} forward and {_bytes(step)} back"
        )
    lora = sizes.linear_sizes * lora_r
    yield ""
    yield "the client's memory, beside data and activations"
    yield f"  embeddings and head {_gb(sizes.client_parameters * itemsize)} in {dtype}"
    yield (
        f"  LoRA r={lora_r} on all linears: {lora / 1e6:.1f} million parameters, {_gb(16 * lora)} with gradients and "
        f"Adam in float32; {_bytes(4 * lora)} go to the servers each step, and as much comes back"
    )


def blocks_held(blocks: Sequence[int], loading_bytes: int, gb: float) -> int:
    """How many of `blocks` (bytes of each) a server with `gb` free hosts; 0 where none fits beside its budgets."""
    from petals_tune.blocks.memory import COMPUTE_SHARE, blocks_that_fit

    limits = OmegaConf.load(folder_of("conf") / "serve.yaml").limits
    budgets_gb = limits.max_lease_gb + limits.max_cache_gb + 2.25 * limits.max_adapter_gb
    working = max(loading_bytes, int(gb * _GB * COMPUTE_SHARE))
    try:
        return blocks_that_fit([int(gb * _GB)], int(budgets_gb * _GB), max(blocks), working, len(blocks))
    except ConfigError:
        return 0


def verdict(blocks: Sequence[int], loading_bytes: int, machines: Sequence[Machines]) -> str:
    """Which machines hold all blocks once, the largest first; else how many blocks are left over."""
    missing, taken = len(blocks), []
    for each in sorted(machines, key=lambda each: -each.gb):
        held = blocks_held(blocks, loading_bytes, each.gb)
        if missing == 0 or held == 0:
            continue
        needed = min(each.count, -(-missing // held))
        missing = max(missing - needed * held, 0)
        taken.append(Machines(gb=each.gb, count=needed))
    if missing:
        return f"does not fit: {missing} of {len(blocks)} blocks are left over"
    spare = sum(each.count for each in machines) - sum(each.count for each in taken)
    return f"fits on {' + '.join(map(str, taken))}" + (f"; {spare} more may host blocks a second time" if spare else "")


def _describe(blocks: Sequence[int]) -> str:
    """The sizes of blocks, each with how many have it where they differ."""
    counted = [(size, len(list(group))) for size, group in groupby(sorted(blocks))]
    if len(counted) == 1:
        return _gb(counted[0][0])
    return f"{_gb(counted[0][0])} to {_gb(counted[-1][0])}"


def _gb(size: float) -> str:
    return f"{size / _GB:.2f} GB" if size >= 0.1 * _GB else f"{size / 2**20:.1f} MB"


def _bytes(size: float) -> str:
    return f"{size / 2**20:.1f} MB" if size >= 2**20 else f"{size / 1024:.1f} kB"


if __name__ == "__main__":
    main()
