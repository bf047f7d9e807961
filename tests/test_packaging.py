"""The commands and recipes work from a checkout, an editable install and a wheel, and pyproject.toml tells the truth.

Each way of installing gets a bare virtual environment that sees the dependencies of the running interpreter, but not
the project that may be installed beside them: nothing is downloaded, and nothing is written into the checkout.
"""

import ast
import importlib.metadata
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.gpu import kit

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
SHIPPED = ("petals_tune", "servers", "conf", "recipes", "pyproject.toml", "README.md", "LICENSE")
# The dependencies lie on this machine; a package index would only make a mistake here slow to see.
PIP_INSTALL = ("-m", "pip", "install", "-qq", "--no-index", "--no-deps", "--no-build-isolation", "--ignore-installed")


@dataclass(frozen=True, kw_only=True)
class Installed:
    """A Python that can run the project, the folder to stand in, and where the project's files must come from."""

    python: Path
    cwd: Path
    home: Path

    def run(self, *arguments: str) -> str:
        return output([str(self.python), *arguments], self.cwd)

    def script(self, name: str, *arguments: str) -> str:
        return output([str(self.python.with_name(name)), *arguments], self.cwd)


def output(command: list[str], cwd: Path) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{' '.join(command)} ended with {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def bare_python(folder: Path) -> Path:
    """The interpreter of a new environment without pip that sees the running one's libraries."""
    venv.create(folder, with_pip=False, symlinks=True)
    purelib = sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)})
    # A path in a .pth file is only added: the .pth files there, those of an editable install among them, stay unread.
    libraries = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    Path(purelib, "dependencies.pth").write_text("\n".join(sorted(libraries)))
    return folder / "bin" / "python"


def copy_of_the_project(folder: Path) -> Path:
    """What a build reads, copied, since setuptools builds inside the tree."""
    folder.mkdir()
    for name in SHIPPED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, folder)
    return folder


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    source = copy_of_the_project(folder / "source")
    build = [sys.executable, "-m", "pip", "wheel", "-qq", "--no-index", "--no-deps", "--no-build-isolation", "-w", "."]
    output([*build, str(source)], folder)
    (built,) = folder.glob("*.whl")
    return built


def from_checkout(folder: Path, _: Path) -> Installed:
    return Installed(python=bare_python(folder / "venv"), cwd=ROOT, home=ROOT)


def from_editable(folder: Path, _: Path) -> Installed:
    source = copy_of_the_project(folder / "source")
    python = bare_python(folder / "venv")
    output([str(python), *PIP_INSTALL, "--editable", str(source)], folder)
    return Installed(python=python, cwd=folder, home=source)


def from_wheel(folder: Path, wheel: Path) -> Installed:
    python = bare_python(folder / "venv")
    output([str(python), *PIP_INSTALL, str(wheel)], folder)
    return Installed(python=python, cwd=folder, home=folder / "venv")


@pytest.fixture(scope="module")
def installed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, wheel: Path) -> Installed:
    """The project, made ready in the way that the test names."""
    return request.param(tmp_path_factory.mktemp(request.param.__name__), wheel)


@pytest.mark.parametrize("installed", [from_checkout, from_editable, from_wheel], indirect=True)
def test_modules_and_recipes_are_found(installed: Installed) -> None:
    seen = installed.run("-c", "import petals_tune, servers; print(petals_tune.__file__); print(servers.__file__)")
    assert all(Path(line).is_relative_to(installed.home) for line in seen.splitlines()), seen
    assert "trainer:" in installed.run("-m", "petals_tune", "recipe=personachat", "--cfg", "job")
    assert "blocks" in installed.run("-m", "servers", "--help")


@pytest.mark.parametrize("installed", [from_editable, from_wheel], indirect=True)
def test_scripts_are_installed(installed: Installed) -> None:
    assert "recipe" in installed.script("petals-tune", "--help")
    assert "blocks" in installed.script("petals-tune-server", "--help")
    assert "browser" in installed.script("petals-tune-health", "--help")


def test_the_wheel_holds_every_module_and_yaml_and_page_and_nothing_else(wheel: Path) -> None:
    expected = {
        str(Path(home, path.relative_to(ROOT / folder)))
        for folder, home in [
            ("petals_tune", "petals_tune"),
            ("servers", "servers"),
            ("conf", "petals_tune/conf"),
            ("recipes", "petals_tune/recipes"),
        ]
        for pattern in ("*.py", "*.yaml", "*.jsonl", "*.html", "*.js", "*.css", "*.svg")
        for path in (ROOT / folder).rglob(pattern)
    }
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert held == expected


def test_the_listed_packages_are_those_of_the_tree() -> None:
    """setuptools ships what is listed and says nothing of the rest: a forgotten package breaks in a wheel alone."""
    tree = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for package in ("petals_tune", "servers")
        for path in (ROOT / package).rglob("*.py")
    }
    assert set(SETUPTOOLS["packages"]) - set(SETUPTOOLS["package-dir"]) == tree


def test_every_library_we_import_is_declared() -> None:
    declared = {canonicalize_name(Requirement(text).name) for text in PROJECT["dependencies"]}
    tinker = {canonicalize_name(Requirement(text).name) for text in PROJECT["optional-dependencies"]["tinker"]}
    sold_by = importlib.metadata.packages_distributions()
    ours = {"petals_tune", "servers"}
    missing = {
        f"{path.relative_to(ROOT)} imports {module}"
        for package in ours
        for path in (ROOT / package).rglob("*.py")
        for module in libraries(path)
        if module not in ours
        and not (declared | (tinker if path.parent.name == "tinker" else set()))
        & {canonicalize_name(name) for name in sold_by.get(module, [])}
    }
    assert sorted(missing) == []


def libraries(path: Path) -> Iterator[str]:
    """Top-level names that a file imports from outside the standard library."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names = [node.module]
        yield from (top for name in names if (top := name.partition(".")[0]) not in sys.stdlib_module_names)


def test_constraints_pin_all_that_is_pulled_in() -> None:
    """Whatever a dependency needs in turn is pinned too: a fresh install in a year gets what was tested today."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {canonicalize_name(Requirement(line).name) for line in lines if line and not line.startswith("#")}
    queue = [Requirement(text) for text in [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["dev"]]]
    needed: set[str] = set()
    while queue:
        requirement = queue.pop()
        if requirement.name not in needed:
            needed.add(requirement.name)
            queue += needs(requirement)
    assert {canonicalize_name(name) for name in needed} - pinned == set()


def needs(requirement: Requirement) -> Iterator[Requirement]:
    """What an installed distribution asks for here, less the CUDA libraries: torch's GPU build brings its own."""
    extras = ["", *requirement.extras]
    for needed in map(Requirement, importlib.metadata.requires(requirement.name) or []):
        asked_for = needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in extras)
        if asked_for and not needed.name.startswith(("cuda-", "nvidia-", "triton")):
            yield needed


def test_the_kit_for_a_gpu_machine_has_every_dependency_that_such_a_machine_lacks() -> None:
    declared = {canonicalize_name(Requirement(line).name) for line in PROJECT["dependencies"]}
    listed = [*kit.WHEELS, *kit.SOURCES, *kit.THERE, *kit.UNNEEDED]
    assert len(listed) == len({*map(canonicalize_name, listed)})
    assert declared - {*map(canonicalize_name, listed)} == set()
    assert {*map(canonicalize_name, [*kit.THERE, *kit.UNNEEDED])} <= declared
