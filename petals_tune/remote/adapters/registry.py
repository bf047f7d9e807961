"""The adapters of one model by name, each in a PeftModel of its own, on one connection to the swarm."""

from __future__ import annotations

import copy
import itertools
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel

from petals_tune.errors import ConfigError
from petals_tune.remote.adapters.choice import Choice
from petals_tune.remote.adapters.view import twin_of, view_of
from petals_tune.tuning.saved import adapter_folder, check_adapter, load_adapter
from petals_tune.tuning.support import deep_prompt_owners, is_adapted, tune

_numbers = itertools.count(1)


@dataclass(frozen=True)
class Entry:
    """One adapter: a PeftModel, and the adapter's name in it."""

    net: PeftModel
    choice: Choice


class Adapters(Mapping[str, PeftModel]):
    """Adapters of a model by name, of any methods: `model.adapters`.

    Each has a PeftModel of its own, which shares the frozen weights and the connection with the model and which is what
    a value of this mapping is. Adapters may be loaded, replaced and removed while other threads call the model: a call
    keeps the adapter that it began with.
    """

    def __init__(self, model: Any, source: str, revision: str | None):
        """source, revision: what the model was loaded from."""
        self._model, self._source, self._revision = model, source, revision
        self._entries: dict[str, Entry] = {}
        self._changing = threading.Lock()

    def load(self, name: str, folder: str | Path, *, trainable: bool = False) -> PeftModel:
        """Load the adapter of a folder, or of a hub name, in PEFT's format; it replaces the one that has this name.

        Raises ConfigError where it is not for this model, UnsupportedAdapter where blocks on servers cannot honour it.
        """
        found = adapter_folder(folder)
        task = _task(self._model)
        check_adapter(found, task=task, source=self._source, revision=self._revision, named=self._source)
        return self._put(name, load_adapter(self._twin(name), found, trainable=trainable))

    def add(self, name: str, config: PeftConfig) -> PeftModel:
        """Make a new adapter, to be trained; it replaces the one that has this name. Raises as `load` does."""
        return self._put(name, tune(self._twin(name), config))

    def adopt(self, net: PeftModel) -> None:
        """Take over all adapters of a PeftModel around this model by the names that they have there.

        Needed for soft prompts alone: of other methods, a call of the PeftModel itself can name an adapter.
        """
        if net.get_base_model() is not self._model:
            raise ConfigError("adopt() takes a PeftModel around this model, and this one is of another", key="adapters")
        if ownerless := deep_prompt_owners(net) - set(net.peft_config):
            raise ConfigError(
                f"the deep prompts of this model belong to {sorted(ownerless)}, which the PeftModel does not have: "
                "load_deep_prompts(model, folder, adapter=NAME)",
                key="adapters",
                seen=sorted(ownerless),
            )
        with self._changing:
            for name in net.peft_config:
                self._entries[_checked(name)] = Entry(net, Choice((name,), next(_numbers)))

    def remove(self, name: str) -> None:
        """Forget an adapter; calls in progress keep it. Raises ConfigError where there is none of this name."""
        with self._changing:
            if self._entries.pop(name, None) is None:
                raise self.unknown(name)

    def __getitem__(self, name: str) -> PeftModel:
        return self._entries[name].net

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._entries))

    def __len__(self) -> int:
        return len(self._entries)

    def entry(self, name: str) -> Entry:
        """Return an adapter. Raises ConfigError where there is none of this name."""
        if not isinstance(name, str) or (found := self._entries.get(name)) is None:
            raise self.unknown(name)
        return found

    def unknown(self, name: object) -> ConfigError:
        """The error for an adapter that is not here."""
        known = ", ".join([*self._entries, *getattr(self._model, "peft_config", ())]) or "none"
        hint = "model.adapters.load(NAME, FOLDER) loads one"
        if isinstance(name, str | Path) and Path(name).is_dir():
            hint = f"load the folder first: model.adapters.load(NAME, {str(name)!r})"
        return ConfigError(f"this model has no adapter {name!r} (it has: {known}); {hint}", key="adapter", seen=name)

    def __deepcopy__(self, memo: dict[int, Any]) -> Adapters:
        """Of a copied model, which begins without adapters."""
        return Adapters(copy.deepcopy(self._model, memo), self._source, self._revision)

    def _put(self, name: str, net: PeftModel) -> PeftModel:
        with self._changing:
            self._entries[name] = Entry(net, Choice((net.active_adapter,), next(_numbers)))
        return net

    def _twin(self, name: str) -> Any:
        _checked(name)
        if is_adapted(self._model):
            raise ConfigError(
                "this model has PEFT's layers or deep prompts in its own blocks, which every adapter beside them would "
                "get too: load all adapters with model.adapters.load or all with the PeftModel's load_adapter",
                key="adapters",
                seen=name,
            )
        with self._changing:
            return twin_of(self._model)


def resolved(model: Any, name: object, *, keep: bool = False) -> tuple[Any, Any]:
    """(a view of a PeftModel or of `model`, the model in it) with adapter `name` on; None: the base model.

    keep: as of `view_of`. Raises ConfigError for an unknown name.
    """
    own = getattr(model, "peft_config", {})
    if name is None or (isinstance(name, str) and name in own):
        view = view_of(model, Choice(() if name is None else (str(name),)), keep=keep)
        return view, view
    entry = model.adapters.entry(name)
    view = view_of(entry.net, entry.choice, keep=keep)
    return view, view.get_base_model()


def _checked(name: str) -> str:
    if not isinstance(name, str) or not name:
        raise ConfigError(f"an adapter's name is a text that is not empty, not {name!r}", key="adapter", seen=name)
    return name


def _task(model: Any) -> str:
    return "SEQ_CLS" if type(model).__name__.endswith("ForSequenceClassification") else "CAUSAL_LM"
