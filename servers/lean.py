"""What the process of a server does without: parts of libraries that come with them and that it never runs.

A command calls these before its slow imports. Whoever imports a server's modules otherwise, as tests do, has the
libraries whole.
"""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec, module_from_spec, resolve_name
from pathlib import Path
from typing import Any


def lean_hivemind() -> None:
    """Its packages import all of it: an optimizer, experts, scipy, and torch, which a node of the directory does not
    need. So they do not: what a package imports, it then imports when somebody asks it for the name."""
    if "hivemind" not in sys.modules:
        for package in ("hivemind", "hivemind.dht", "hivemind.utils"):
            _import_on_demand(package)


@contextmanager
def lean_transformers() -> Iterator[None]:
    """Import transformers and bitsandbytes inside this, after `lean_hivemind`.

    They load torch's compiler to mark functions for it, and a server compiles nothing; distributed tensors, and it is
    not one process of several; scipy to find objects in pictures. This and hivemind's parts took 150 MB.
    """
    import torch

    _import_on_demand("torch._dynamo", disable=_as_it_is, allow_in_graph=_as_it_is, assume_constant_result=_as_it_is)
    torch.distributed.is_available = lambda: False
    sys.modules["scipy"] = None  # type: ignore[assignment]  # as good as not installed
    compile_ = torch.compile
    torch.compile = _as_it_is  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = compile_


def _as_it_is(function: Callable[..., Any] | None = None, *_: Any, **__: Any) -> Callable[..., Any]:
    """A decorator, with or without options, that does nothing."""
    return _as_it_is if function is None else function


def _import_on_demand(name: str, **instead: object) -> None:
    """Put the package `name` where imports find it, its __init__.py read and not run; `instead` are names in it."""
    spec = find_spec(name)
    assert spec is not None
    assert spec.origin is not None
    package: Any = module_from_spec(spec)
    place_of = _imports(ast.parse(Path(spec.origin).read_text()), name)

    def imported(attribute: str) -> object:
        if attribute not in place_of:
            raise AttributeError(f"module {name!r} has no attribute {attribute!r}")
        module = importlib.import_module(place_of[attribute])
        return getattr(module, attribute, module)  # what was imported may be the module itself

    package.__getattr__ = imported
    vars(package).update(instead)
    sys.modules[name] = package
    parent, _, child = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], child, package)


def _imports(tree: ast.Module, package: str) -> dict[str, str]:
    """Name in a package's __init__.py -> module that it is from."""
    places: dict[str, str] = {}
    for node in tree.body:
        if isinstance(node, ast.ImportFrom):
            module = resolve_name("." * node.level + (node.module or ""), package)
            places |= {alias.name: module if node.module else f"{module}.{alias.name}" for alias in node.names}
    return places
