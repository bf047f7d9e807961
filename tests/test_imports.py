"""Who may import whom, read from the source files themselves: imports point down, and never round."""

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# The rooms of the house, from the ground up: a room, and the rooms that it may import. A room is a module or a package
# with all that is in it; a file belongs to the room with the longest name that fits. Names stand below `petals_tune`
# unless they are in TOP. Inside a room everything is allowed except a circle.
TOP = ("petals_tune", "servers", "conf", "recipes")
MAY_IMPORT = {
    # floor 1
    "errors": "",
    "files": "errors",
    "checksums": "errors files",
    "copies": "",
    # floor 2
    "wire": "errors",
    "cli": "errors",
    "hydra_errors": "errors",
    "config": "errors hydra_errors",  # knows what it checks only by the names in the YAML
    # floor 3
    "net": "errors files wire",
    "model": "errors files checksums wire.span",
    "losses": "errors",
    "adapters": "errors wire.adapter",  # methods that `tuning` collects and `blocks` applies
    # floor 4
    "blocks": "errors copies files wire model adapters",  # a client may run some blocks itself: no network, no server
    "tuning": "errors copies files checksums wire.adapter model adapters",  # how an adapter's parts are named
    "data": "errors files checksums model",
    "swarm": "errors wire net",
    # floor 5
    "remote": "errors copies wire net model adapters blocks tuning swarm",
    "servers": "__version__ errors files cli config wire net model blocks",
    # floor 6
    "train": "errors config copies hydra_errors wire files checksums model blocks.quantization tuning data net swarm "
    "remote",
    # floor 7
    "service": "errors config files model losses adapters tuning data swarm.loop remote sampling train.options "
    "train.chunked_loss",
    # floor 8: the commands, and the package's own front, which imports what it offers on first use
    "petals_tune": "errors cli config hydra_errors wire files checksums model blocks tuning data net swarm remote "
    "train service",
    "conf": "",
    "recipes": "",
}

# A library, and the only rooms that may know it.
KNOWN_ONLY_TO = {
    "hivemind": "net",
    "transformers": "model blocks data tuning remote train service petals_tune servers",
    "peft": "adapters tuning remote train service petals_tune",
    "lightning": "data train petals_tune",
    "datasets": "data",
    "hydra": "hydra_errors config train petals_tune servers",
    "wandb": "train petals_tune",
    "starlette": "service",
    "uvicorn": "service",
    "llguidance": "service",
    "tinker": "service",
    "aiohttp": "servers",
    "prometheus_client": "servers service",
}

# Bytes of a stranger must never become code: no unpickling, no evaluation, no shell, anywhere.
FORBIDDEN_IMPORTS = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "marshal", "shelve", "joblib", "ctypes"}
EXCUSED = {"petals_tune.blocks.memory imports ctypes": "to call malloc_trim, with no argument of anybody's"}
FORBIDDEN_CALLS = {
    *("eval", "exec", "compile", "__import__", "builtins.eval", "builtins.exec", "builtins.compile"),
    *("torch.load", "torch.serialization.load", "torch.jit.load", "np.load", "numpy.load"),
    *("yaml.load", "yaml.unsafe_load", "yaml.full_load", "pd.read_pickle", "pandas.read_pickle"),
    *("os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput"),
}

# Who handles what strangers sent opens no file and starts no process: no path of theirs can be one.
HANDLES_STRANGERS = (
    "petals_tune.wire",
    "petals_tune.adapters",
    *(
        f"petals_tune.net.{name}"
        for name in (
            *("circuit_relay", "dht", "dial_back", "direct", "directory"),
            *("in_process", "own_lag", "peer", "pool", "question", "stream", "transport", "verdict"),
        )
    ),
    *(f"petals_tune.blocks.{name}" for name in ("adapters", "engine", "generation", "graphs", "kernels", "passes")),
    *("servers.requests", "servers.stores", "servers.scheduling"),
    *("servers.health.report", "servers.health.table"),
)
# Whoever talks to strangers draws nothing that follows from a run's seed, nor moves the generators that a run saves.
TALKS_TO_STRANGERS = ("petals_tune.net", "petals_tune.swarm", "servers")
SEEDED = ("random.", "np.random.", "numpy.random.")
OPENS_FILES = {"pathlib", "os", "io", "shutil", "tempfile", "glob", "subprocess", "importlib", "runpy", "urllib"}


@dataclass(frozen=True, kw_only=True)
class Source:
    """One file of ours, parsed."""

    name: str
    is_package: bool
    tree: ast.Module

    def imports(self) -> Iterator[tuple[int, str]]:
        """(line, absolute dotted name) of each import, those inside functions and `TYPE_CHECKING` included."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                yield from ((node.lineno, alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                base = self._absolute(node)
                yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)

    def calls(self) -> Iterator[tuple[int, str]]:
        """(line, dotted name as written) of each call of a plain name or attribute."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute):
                yield node.lineno, ast.unparse(node.func)

    def _absolute(self, node: ast.ImportFrom) -> str:
        if node.level == 0:
            return node.module or ""
        package = self.name.split(".") if self.is_package else self.name.split(".")[:-1]
        here = package[: len(package) - node.level + 1]
        return ".".join([*here, node.module] if node.module else here)


def parse(root: Path) -> dict[str, Source]:
    """All modules of the packages under `root`, by dotted name."""
    sources = {}
    for package in TOP:
        for path in sorted((root / package).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            is_package = parts[-1] == "__init__"
            name = ".".join(parts[:-1] if is_package else parts)
            sources[name] = Source(name=name, is_package=is_package, tree=ast.parse(path.read_text(), str(path)))
    return sources


def rooms(words: str) -> list[str]:
    """The dotted names of rooms, from a cell of the tables."""
    return [word if word in TOP else f"petals_tune.{word}" for word in words.split()]


ALLOWED = {rooms(room)[0]: rooms(words) for room, words in MAY_IMPORT.items()}


def within(name: str, room: str) -> bool:
    return name == room or name.startswith(f"{room}.")


def room_of(name: str) -> str:
    """The room that a module, or a name inside it, belongs to; "" for a stranger."""
    return max((room for room in ALLOWED if within(name, room)), key=len, default="")


def wrong_directions(sources: dict[str, Source]) -> list[str]:
    """Imports from one room of ours into another that the table does not allow."""
    wrong = []
    for source in sources.values():
        here = room_of(source.name)
        for line, target in source.imports():
            there = room_of(target)
            allowed = there in ("", here) or any(within(target, room) for room in ALLOWED[here])
            if not allowed:
                wrong.append(f"{source.name}:{line} imports {target}, which {here} may not")
    return wrong


def circles(sources: dict[str, Source]) -> list[str]:
    """The first circle of imports, module by module, if there is one. Imports inside functions count as well."""
    graph = {
        source.name: {module for _, target in source.imports() if (module := module_of(target, sources))}
        - {source.name}
        for source in sources.values()
    }
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return [" <- ".join(error.args[1])]
    return []


def module_of(target: str, sources: dict[str, Source]) -> str | None:
    """The file that `target` (a module, or a name inside one) stands in."""
    return next((name for name in (target, target.rpartition(".")[0]) if name in sources), None)


def strangers(sources: dict[str, Source]) -> list[str]:
    """Libraries in rooms that should not know them."""
    return [
        f"{source.name}:{line} imports {target}, known only to: {known}"
        for source in sources.values()
        for line, target in source.imports()
        if (known := KNOWN_ONLY_TO.get(target.partition(".")[0])) and room_of(source.name) not in rooms(known)
    ]


def dangers(sources: dict[str, Source]) -> list[str]:
    """Ways to turn bytes into code."""
    found = []
    for source in sources.values():
        found += [
            f"{source.name}:{line} imports {target}"
            for line, target in source.imports()
            if target.partition(".")[0] in FORBIDDEN_IMPORTS or target in FORBIDDEN_CALLS
            if f"{source.name} imports {target}" not in EXCUSED
        ]
        found += [f"{source.name}:{line} calls {call}()" for line, call in source.calls() if call in FORBIDDEN_CALLS]
    return found


def openers(sources: dict[str, Source]) -> list[str]:
    """Ways to a file where bytes of strangers are handled."""
    found = []
    for source in sources.values():
        if any(within(source.name, room) for room in HANDLES_STRANGERS):
            found += [
                f"{source.name}:{line} imports {target}"
                for line, target in source.imports()
                if target.partition(".")[0] in OPENS_FILES
            ]
            found += [f"{source.name}:{line} calls {call}()" for line, call in source.calls() if call == "open"]
    return found


def seeded(sources: dict[str, Source]) -> list[str]:
    """Draws from the global generators, which are seeded, where strangers may profit from knowing them."""
    return [
        f"{source.name}:{line} calls {call}()"
        for source in sources.values()
        if any(within(source.name, room) for room in TALKS_TO_STRANGERS)
        for line, call in source.calls()
        if call.startswith(SEEDED) and not call.startswith("random.SystemRandom")
    ]


RULES = [wrong_directions, circles, strangers, dangers, openers, seeded]


@pytest.mark.parametrize("rule", RULES)
def test_the_house_keeps_the_rule(rule):
    assert rule(parse(ROOT)) == []


@pytest.mark.parametrize(
    ("rule", "path", "text"),
    [
        (wrong_directions, "petals_tune/wire/span.py", "from petals_tune.swarm.routes.route import Route"),
        (wrong_directions, "petals_tune/tuning/support.py", "def late():\n    from ..wire import span"),
        (wrong_directions, "petals_tune/errors.py", "import petals_tune.wire.span"),
        (wrong_directions, "petals_tune/train/run.py", "import servers.server"),
        (wrong_directions, "petals_tune/train/run.py", "from petals_tune.chat import main"),
        (wrong_directions, "petals_tune/chat.py", "from servers import server"),
        (wrong_directions, "servers/server.py", "from petals_tune.swarm.chain import Chain"),
        (wrong_directions, "servers/server.py", "from petals_tune.swarm import chain"),
        (circles, "petals_tune/swarm/route.py", "from petals_tune.swarm import retry"),
        (strangers, "petals_tune/remote/auto.py", "import hivemind.p2p"),
        (strangers, "petals_tune/swarm/chain.py", "from transformers import AutoModel"),
        (dangers, "petals_tune/wire/tensors.py", "import pickle"),
        (dangers, "petals_tune/train/run.py", "torch.load('x')"),
        (dangers, "servers/requests/handler.py", "eval('1')"),
        (dangers, "servers/server.py", "os.system('ls')"),
        (openers, "servers/requests/handler.py", "from pathlib import Path"),
        (openers, "petals_tune/wire/records.py", "def read(path): return open(path)"),
        (seeded, "petals_tune/swarm/repair.py", "import random\nrandom.uniform(0, 1)"),
    ],
)
def test_a_breach_is_seen(rule, path, text, tmp_path):
    house = {
        path: text,
        "petals_tune/swarm/retry.py": "from .route import Route",
        "petals_tune/swarm/__init__.py": "",
        "petals_tune/__init__.py": "",
    }
    for name, body in house.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(body)
    assert len(rule(parse(tmp_path))) == 1
    assert not any(other(parse(tmp_path)) for other in RULES if other is not rule)


def test_the_errors_cost_nothing_to_import():
    """`petals_tune/__init__.py` imports on first use: whoever needs one small room does not load torch."""
    heavy = "{'torch', 'hivemind', 'transformers', 'lightning'}"
    code = f"import sys, petals_tune.errors; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
