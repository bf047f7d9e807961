"""Checks of every command and every piece of Python in README.md and docs/; `CHECKS` has the check of each command.

Our own commands are composed and checked against their schemas: every key, choice and value in them exists. What they
do is tested elsewhere (tests/e2e, tests/train, test_chat.py, test_merge.py, ...). Python must compile, and every name
that it imports must exist.
"""

import ast
import importlib
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from petals_tune import chat, evaluate, merge, plan
from petals_tune.config import check_arguments, recipe_names
from petals_tune.serve import Service
from servers.options import Serve

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

# Placeholders for a reader's own value in a command.
PLACEHOLDERS = {
    r"\brecipe=NAME\b": "recipe=sst2",
    r"\[key=value \.\.\.\]": "",
    r"\[group=choice \.\.\.\]": "",
    r"=\.\.\.(?=\s|$)": "=x",
}

SHELL = re.compile(
    r"^(\w+=\S+ )*(python|make|pip|eval|wandb|petals-tune|petals-tune-server|curl|export|cd"
    r"|docker|git|pytest|sudo|systemctl|torchrun|journalctl|useradd|cp|mkdir)\b"
)


def blocks(text: str) -> Iterator[list[str]]:
    """The lines of each indented or fenced block."""
    fenced: list[str] | None = None
    indented: list[str] = []
    for line in [*text.splitlines(), ""]:
        if line.lstrip().startswith("```"):
            if fenced is not None:
                yield fenced
            fenced = [] if fenced is None else None
        elif fenced is not None:
            fenced.append(line)
        elif line.startswith("    ") or (indented and not line):
            indented.append(line[4:])
        elif indented:
            yield indented
            indented = []
    if indented:
        yield indented


def commands(text: str) -> Iterator[str]:
    for block in blocks(text):
        joined = "\n".join(block).replace("\\\n", " ").splitlines()
        yield from (line for line in joined if SHELL.match(line))


def python(text: str) -> Iterator[str]:
    for block in blocks(text):
        if any(re.match(r"(from \w\S* )?import ", line) for line in block):
            yield "\n".join(block)


def arguments_of(command: str) -> list[str]:
    for pattern, value in PLACEHOLDERS.items():
        command = re.sub(pattern, value, command)
    return shlex.split(command, comments=True)


def _composed(config_name: str = "train", **schema: type) -> Callable[[list[str]], None]:
    return lambda arguments: check_arguments(arguments, config_name=config_name, **schema)


def _chat(arguments: list[str]) -> None:
    check_arguments(chat.with_prompt_key(arguments), config_name="chat", schema=chat.Chat)


def _plan(arguments: list[str]) -> None:
    check_arguments(plan.with_plain_values(arguments), config_name="plan", schema=plan.Options)


def _make(arguments: list[str]) -> None:
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert {word for word in arguments if "=" not in word} <= set(targets)


def _module_exists(arguments: list[str]) -> None:
    module = importlib.util.find_spec(arguments[0])
    assert module is not None


def _file_exists(arguments: list[str]) -> None:
    assert (ROOT / arguments[0]).is_file()


def _compiles(source: str) -> None:
    compile(source, source, "exec")


def _unchecked(arguments: list[str]) -> None: ...


# (beginning of a command, its check); the first that matches is used.
CHECKS: list[tuple[str, Callable[[list[str]], None]]] = [
    ("python -m petals_tune.chat", _chat),
    ("python -m petals_tune.evaluate", _composed("evaluate", schema=evaluate.Evaluation)),
    ("python -m petals_tune.plan", _plan),
    ("python -m petals_tune.merge", _composed("merge", schema=merge.Merge)),
    ("python -m petals_tune.serve", _composed("service", schema=Service)),
    ("python -m petals_tune", _composed()),
    ("petals-tune -sc", _unchecked),  # tests/test_config.py asks for completions
    ("petals-tune", _composed()),
    ("python -m servers", _composed("serve", schema=Serve)),
    ("petals-tune-server", _composed("serve", schema=Serve)),
    ("petals-tune-service", _composed("service", schema=Service)),
    ("python -c", lambda arguments: _compiles(arguments[0])),
    ("make", _make),
    ("python tests/", lambda arguments: _file_exists([f"tests/{arguments[0]}", *arguments[1:]])),
    # Not run: they change the reader's shell or environment, or need the network.
    ("pip install", _unchecked),
    ("eval", _unchecked),
    ("export", _unchecked),
    ("wandb sync", _unchecked),
    ("curl", _unchecked),
    ("docker", _unchecked),  # tests/test_deploy.py reads what it builds and runs
]


def found(kind: Callable[[str], Iterator[str]]) -> list[tuple[str, str]]:
    return [(page.relative_to(ROOT).as_posix(), text) for page in PAGES for text in kind(page.read_text())]


@pytest.mark.parametrize(("page", "command"), found(commands))
def test_a_command_is_one_that_works(page: str, command: str) -> None:
    bare = re.sub(r"^(\w+=\S+ )+", "", command)
    for beginning, check in CHECKS:
        # A word must end there: `python -m petals_tune.model.convert` is no `python -m petals_tune`.
        if re.match(rf"{re.escape(beginning)}(?![\w.])" if beginning[-1] != "/" else re.escape(beginning), bare):
            # Optuna's search space is the plugin's own grammar, and the plugin is an extra.
            optuna = "hydra/sweeper=optuna" in bare
            if not optuna:
                check(arguments_of(bare.removeprefix(beginning)))
            return
    if module := re.match(r"python -m ([\w.]+)", bare):
        _module_exists([module[1]])  # a command without Hydra: its own tests know its arguments
        return
    pytest.fail(f"{page} has a command that nobody checks: {command}")


@pytest.mark.parametrize(("page", "source"), found(python))
def test_python_compiles_and_imports_what_exists(page: str, source: str) -> None:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module:
            module = importlib.import_module(node.module)
            assert all(hasattr(module, alias.name) for alias in node.names), f"{page}: {ast.unparse(node)}"


def test_every_page_is_linked_from_the_readme() -> None:
    readme = (ROOT / "README.md").read_text()
    assert not [page.name for page in PAGES[1:] if f"docs/{page.name}" not in readme]


def test_every_link_between_pages_leads_somewhere() -> None:
    for page in PAGES:
        prose = re.sub(r"`[^`]*`", "", page.read_text())  # code may look like a link
        for link in re.findall(r"\]\((?!https?:|#)([^)#]+)", prose):
            assert (page.parent / link).exists(), f"{page.name}: {link}"


def test_every_file_and_function_that_a_page_names_exists() -> None:
    """`path/file.py`, or `path/file.py: name`, where a path may leave `petals_tune/` or `servers/` out."""
    missing = []
    for page in PAGES:
        for path, name in re.findall(r"`([\w/]+/[\w/]+\.py)(?:: ([\w.]+))?`", page.read_text()):
            found = [top / path for top in (ROOT, ROOT / "petals_tune", ROOT / "servers") if (top / path).is_file()]
            source = found[0].read_text() if found else ""
            defined = all(re.search(rf"\b(def|class) {part}\b", source) for part in name.split(".") if part)
            if "NAME" not in path and not (found and defined):
                missing.append(f"{page.name}: {path} {name}")
    assert not missing


def test_every_recipe_is_named_in_the_documentation() -> None:
    text = "".join(page.read_text() for page in PAGES)
    assert not [name for name in recipe_names() if name not in text]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_test_that_is_named_is_there(page: Path):
    """`tests/a/test_b.py::test_c`, or `::test_d` for another one of the same file."""
    file = ""
    for path, name in re.findall(r"`(tests/[\w/]+\.py)?(?:::(\w+))?`", page.read_text(encoding="utf-8")):
        if not (path or name):
            continue
        file = path or file
        source = (ROOT / file).read_text(encoding="utf-8")
        assert not name or re.search(rf"^(async )?def {name}\(", source, re.MULTILINE), f"{file} has no {name}"
