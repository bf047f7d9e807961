"""What the sections of the GPU check share: the card, sizes of models, and rows of the table."""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import torch


class Context:
    """One child process of the check."""

    def __init__(self, options: argparse.Namespace):
        self.rehearse: bool = options.rehearse
        self.device: str = options.device
        self.work = Path(options.work)
        self._rows: int | None = options.rows
        self._usable = True
        os.environ["PETALS_TUNE_CACHE"] = str(self.work / "cache")
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()

    @property
    def on_gpu(self) -> bool:
        return self.device.startswith("cuda")

    def run(self, section: str) -> None:
        self._usable = True
        with self.trying("whole section"):
            import_module(f"tests.gpu.{section}").run(self)
        self._send({"done": True, "usable": self._usable})

    def row(
        self,
        what: str,
        value: Any = None,
        unit: str = "",
        *,
        at_most: float | None = None,
        at_least: float | None = None,
        ok: bool | None = None,
        note: str = "",
    ) -> None:
        """A row of the table: a figure with its goal where it has one, or a check that passed or failed."""
        goal = ""
        if at_most is not None:
            ok, goal = bool(value <= at_most), f"at most {at_most:g}"
        if at_least is not None:
            ok, goal = bool(value >= at_least), f"at least {at_least:g}"
        shown = float(f"{value:.4g}") if isinstance(value, float) else value
        row = {"what": what, "value": shown, "unit": unit, "goal": goal, "ok": ok, "note": note}
        self._send({name: each for name, each in row.items() if each not in (None, "")})

    @contextmanager
    def trying(self, what: str) -> Iterator[None]:
        """A failure inside becomes a row, and the section goes on."""
        try:
            yield
        except Exception as error:  # whatever a library raises on a machine that nobody has seen
            traceback.print_exc()
            place = traceback.extract_tb(error.__traceback__)[-1]
            text = (str(error).strip().splitlines() or [""])[0][:200]
            note = f"{type(error).__name__}: {text} ({Path(place.filename).name}:{place.lineno})"
            self.row(what, ok=False, note=note)
            if isinstance(error, torch.OutOfMemoryError):
                torch.cuda.empty_cache()
            elif "CUDA error" in str(error):  # nothing works in this process any more
                self._usable = False
                raise

    def _send(self, row: dict[str, Any]) -> None:
        if self._rows is not None:
            os.write(self._rows, json.dumps(row).encode() + b"\n")

    # The card, of which a CPU has nothing to tell.

    def wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()

    def allocated(self) -> int:
        """Bytes that tensors of this process asked for: the allocator gives 512 at a time, and keeps more."""
        return torch.cuda.memory_stats()["requested_bytes.all.current"] if self.on_gpu else 0

    def peak(self) -> int:
        """The most of `allocated` since `forget`."""
        return torch.cuda.memory_stats()["requested_bytes.all.peak"] if self.on_gpu else 0

    def forget(self) -> None:
        """Free what nothing refers to, and begin to watch for a new peak."""
        gc.collect()
        if self.on_gpu:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def used_bytes(self) -> int:
        """Of the whole card, by all processes."""
        if not self.on_gpu:
            return 0
        free, total = torch.cuda.mem_get_info()
        return total - free

    def seconds(self, work: Callable[[], Any], *, times: int = 5) -> float:
        """The median of `times` runs after one that is not timed, each to the end of what it started on the card."""
        return self.in_turns(work, times=times)[0]

    def in_turns(self, *sides: Callable[[], Any], times: int = 5) -> list[float]:
        """The median of each of `sides`, which run in turns: what else the machine does is the same for all."""
        for work in sides:
            work()
        found: list[list[float]] = [[] for _ in sides]
        for _ in range(times):
            for work, seconds in zip(sides, found, strict=True):
                self.wait()
                started_s = time.perf_counter()
                work()
                self.wait()
                seconds.append(time.perf_counter() - started_s)
        return [statistics.median(seconds) for seconds in found]
