"""Check and measure servers and clients on a CUDA GPU, without any network; ends within six minutes.

    python tests/gpu/check.py [--out FOLDER] [--device cuda] [--seconds 345] [--only NAME,...]
    python tests/gpu/check.py --rehearse       tiny models on the CPU, and the engine on a pretended GPU

Needs Linux, torch with CUDA and what `make gpu-kit` packs. What matters most comes first. Sections run in a child
process, so that one that hangs or crashes costs its own time alone; it becomes a row of the table. Rows are printed as
they come and written to FOLDER/results.json; a table follows, also after SIGTERM and Ctrl-C, and the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
import types
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SLOWER = 4  # a rehearsal, on two cores
END_S = 8.0  # before the end: to stop what runs, and for the table


@dataclass(frozen=True)
class Section:
    name: str  # of the module tests/gpu/NAME.py, whose `run(context)` it is
    limit_s: float
    alone: bool = False  # in a process of its own


SECTIONS = [
    Section("machine", 75),
    Section("parity", 90),
    # Autograd has one thread for a card, which blocks of the same process would want.
    Section("card_client", 60, alone=True),
    Section("speed", 190),
    Section("cards", 45),
    Section("memory", 40),
    Section("requests", 45),
    Section("swarm", 90),
    Section("engine", 30),
    Section("pretended", 60),  # in a rehearsal alone
]
MEASURED = ("memory", "engine", "swarm", "speed")  # whose figures are in the last line


def main() -> None:
    options = arguments()
    if options.child:
        child(options)
        return
    started_s = time.monotonic()
    out = Path(options.out or tempfile.mkdtemp(prefix="gpu-check-"))
    out.mkdir(parents=True, exist_ok=True)
    table = Table(out / "results.json", started_s)
    wanted = options.only.split(",") if options.only else [each.name for each in SECTIONS]
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit(1))
    with tempfile.TemporaryDirectory(prefix="gpu-check-", ignore_cleanup_errors=True) as work:
        try:
            run_all(options, [each for each in SECTIONS if each.name in wanted], table, Path(work), out)
        finally:
            table.finish()  # before the files of the models are removed


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", help="folder for results.json and the logs of the child processes")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=345, help="time for all of it")
    parser.add_argument("--only", help="names of sections, with commas")
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--child", help=argparse.SUPPRESS)  # "sections", "models", "client" or "training"
    parser.add_argument("--work", help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=int, help=argparse.SUPPRESS)  # a file descriptor
    parser.add_argument("--client", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rehearse:
        options.device, options.seconds = "cpu", SLOWER * options.seconds
    return options


def run_all(options: argparse.Namespace, sections: list[Section], table: Table, work: Path, out: Path) -> None:
    end_s = table.started_s + options.seconds - END_S
    models = Child(options, "models", work, out)  # makes the large model while the others run
    worker: Child | None = None
    try:
        for section in sections:
            if section.name == "pretended" and not options.rehearse:
                continue
            limit_s = min(section.limit_s * (SLOWER if options.rehearse else 1), end_s - time.monotonic())
            if limit_s < 5:
                table.add({"section": section.name, "what": "not run", "ok": False, "note": "no time was left"})
                continue
            if section.alone and worker is not None:
                worker.stop()
                worker = None
            worker = worker or Child(options, "sections", work, out)
            if not worker.run(section.name, limit_s, table) or section.alone:
                worker.stop()
                worker = None
    finally:
        for each in (worker, models):
            if each is not None:
                each.stop()


class Child:
    """This script as a child process in a process group of its own; its rows come through a pipe."""

    number = 0

    def __init__(self, options: argparse.Namespace, role: str, work: Path, out: Path):
        Child.number += 1
        self._log = out / f"{role}{Child.number}.log"
        reading, writing = os.pipe()
        command = [sys.executable, "-u", __file__, "--child", role, "--work", str(work), "--rows", str(writing)]
        command += ["--rehearse"] if options.rehearse else ["--device", options.device]
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                text=True,
                env=environment(),
                pass_fds=[writing],
                start_new_session=True,
            )
        os.close(writing)
        self._rows, self._buffer = reading, b""

    def run(self, section: str, limit_s: float, table: Table) -> bool:
        """Run a section; false where the process is of no use afterwards."""
        stop_s = time.monotonic() + limit_s
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it has ended, as its pipe of rows will tell
            self._process.stdin.write(section + "\n")
            self._process.stdin.flush()
        while True:
            while b"\n" in self._buffer:
                line, _, self._buffer = self._buffer.partition(b"\n")
                row = json.loads(line)
                if row.get("done"):
                    return bool(row["usable"])
                table.add({"section": section, **row})
            left_s = stop_s - time.monotonic()
            if left_s <= 0 or not select.select([self._rows], [], [], left_s)[0]:
                table.add({"section": section, "what": "the rest", "ok": False, "note": f"not done in {limit_s:.0f} s"})
                print(self.tail(), flush=True)
                return False
            if not (data := os.read(self._rows, 65536)):
                table.add({"section": section, "what": "the rest", "ok": False, "note": "the process ended"})
                print(self.tail(), flush=True)
                return False
            self._buffer += data

    def tail(self) -> str:
        return "\n".join(f"    | {line[:300]}" for line in self._log.read_text(errors="replace").splitlines()[-15:])

    def stop(self) -> None:
        """End the process with its children. Servers that it started end when their standard input closes."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        os.close(self._rows)


class Table:
    """All rows so far."""

    def __init__(self, path: Path, started_s: float):
        self._path, self.started_s = path, started_s
        self._rows: list[dict[str, Any]] = []

    def add(self, row: dict[str, Any]) -> None:
        row["at_s"] = round(time.monotonic() - self.started_s, 1)
        self._rows.append(row)
        print(f"{row['at_s']:6.1f} s  {row['section']}: {formatted(row)}", flush=True)
        self._path.write_text(json.dumps(self._rows, indent=1))

    def finish(self) -> None:
        print("\n| section | what | value | goal | |\n|---|---|---|---|---|")
        for row in self._rows:
            value = f"{row.get('value', '')} {row.get('unit', '')}".strip()
            verdict = {True: "ok", False: "FAILED", None: ""}[row.get("ok")]
            print(f"| {row['section']} | {row['what']} | {value} | {row.get('goal', '')} | {verdict} |")
        verdicts = [row.get("ok") for row in self._rows]
        figures = {row["what"]: row["value"] for row in self._rows if row["section"] in MEASURED and "value" in row}
        failed = [f"{row['section']}: {row['what']}" for row in self._rows if row.get("ok") is False]
        seconds = round(time.monotonic() - self.started_s, 1)
        print(json.dumps({"ok": verdicts.count(True), "failed": failed, "seconds": seconds, "figures": figures}))


def formatted(row: dict[str, Any]) -> str:
    parts = [row["what"], str(row.get("value", "")), row.get("unit", "")]
    parts += [f"({row['goal']})" if row.get("goal") else "", {True: "ok", False: "FAILED", None: ""}[row.get("ok")]]
    return " ".join(part for part in [*parts, row.get("note", "")] if part)


def environment() -> dict[str, str]:
    """For child processes: they find our packages, and ask no hub."""
    paths = [str(ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    ours = {"PYTHONPATH": os.pathsep.join(dict.fromkeys(paths)), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "0"}
    return {**os.environ, **ours, "HF_DATASETS_OFFLINE": "1", "PYTHONFAULTHANDLER": "1"}


def child(options: argparse.Namespace) -> None:
    # Some distributions install a package `tests` of their own, which would win over a folder without __init__.py.
    tests = types.ModuleType("tests")
    tests.__path__ = [str(ROOT / "tests")]
    sys.modules["tests"] = tests
    sys.path[0] = str(ROOT)
    context = import_module("tests.gpu.context").Context(options)
    if options.child == "sections":
        for line in sys.stdin:
            context.run(line.strip())
    elif options.child == "models":
        import_module("tests.gpu.models").make_large(context)
    elif options.child == "training":
        import_module("tests.gpu.training").main(context, options.client)
    else:
        import_module("tests.gpu.client").main(options.client)
    os._exit(0)  # without waiting for threads that a failed section left


if __name__ == "__main__":
    main()
