"""Format a report as text for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from servers.health.report import ModelReport, Report, ServerReport

_RED = "\x1b[31m{}\x1b[0m"
WIDTH = 48  # most characters of a row's diagram of the blocks
_MARKS = {"online": "#", "joining": "-", "silent": "?"}
_HEAD = ("server", "blocks", "state", "tokens/s", "quantized", "dtype", "device", "version", "free cache", "latency")


def format_table(report: Report, *, coloured: bool = False) -> str:
    """Format models, their servers with a diagram of the blocks that each holds, and in red the uncovered blocks."""
    models = [_of_model(model, red=_RED if coloured else "{}") for model in report.models]
    if report.more_models:
        models.append(f"and {report.more_models} more models, which were not looked at")
    return "\n\n".join(models) or "no server is announced in this network"


def _of_model(model: ModelReport, *, red: str) -> str:
    count = len(model.servers)
    servers = f"{count} server{'s' * (count != 1)}" + (" of many" if model.is_sample else "")
    lines = [
        f"{model.name}: {model.total_blocks} blocks, {servers}, "
        f"slowest block {_rate(min(model.block_tokens_per_s))} tokens/s"
    ]
    width = min(WIDTH, model.total_blocks)
    rows = [("", *_HEAD), *((_diagram(model, server, width), *_cells(server)) for server in model.servers)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines += ["  ".join(cell.ljust(size) for cell, size in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines += [f"{server.peer[-6:]} is silent: {server.problem}" for server in model.servers if server.problem]
    if model.uncovered:
        lines.append(red.format(f"UNCOVERED: no server answers for blocks {', '.join(map(str, model.uncovered))}"))
    return "\n".join(lines)


def _cells(server: ServerReport) -> Sequence[str]:
    name = f"{server.public_name} " if server.public_name else ""
    return (
        f"{name}..{server.peer[-6:]}",
        str(server.blocks),
        server.state,
        _rate(server.tokens_per_s),
        server.quantization,
        server.dtype,
        server.device,
        server.version,
        "" if server.free_cache_bytes is None else f"{server.free_cache_bytes / 2**30:.2f} GB",
        "" if server.latency_s is None else f"{1000 * server.latency_s:.1f} ms",
    )


def _diagram(model: ModelReport, server: ServerReport, width: int) -> str:
    """One character for each block, or for several; marked where the server holds any of them."""
    first = server.blocks.start * width // model.total_blocks
    last = -(-server.blocks.stop * width // model.total_blocks)
    return "." * first + _MARKS[server.state] * (last - first) + "." * (width - last)


def _rate(tokens_per_s: float) -> str:
    return f"{tokens_per_s:.3g}" if tokens_per_s < 1000 else f"{tokens_per_s:,.0f}"
