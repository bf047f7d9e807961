"""Checkpoints in Hugging Face format, in a local folder or on a hub: only the tensors that are asked for are read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from http import HTTPStatus
from pathlib import Path
from typing import Any

import torch
from httpx2 import HTTPError, TransportError
from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from transformers import AutoConfig, GenerationConfig, PretrainedConfig
from transformers.utils.hub import cached_file

from petals_tune.errors import HubUnreachable, PetalsTuneError, UnsupportedModel
from petals_tune.model.disk import DiskCache
from petals_tune.model.download import Blob, check
from petals_tune.model.nested import text_config
from petals_tune.model.packed import PackedFormat, PackedTensor, check_unpacked, find_format, take_quantization
from petals_tune.model.stored import FLOATS, StoredTensor, opened, tensors_in

_INDEX, _SINGLE, _GENERATION = "model.safetensors.index.json", "model.safetensors", "generation_config.json"


@dataclass(frozen=True)
class Checkpoint:
    """A model: `source` is a folder with config.json and safetensors files, or the name of a model on a hub.

    Files from a hub are kept in `disk`; None: in huggingface_hub's own cache. `revision` and `token` are the hub's, as
    in transformers: a branch, tag or commit (None: the main branch), and an access token (None: HF_TOKEN in the
    environment, or that of `hf auth login`; False: none).
    """

    source: str
    disk: DiskCache | None = None
    revision: str | None = None
    token: str | bool | None = field(default=None, repr=False)

    @property
    def config(self) -> PretrainedConfig:
        """The parsed config.json, without `quantization_config`: packed weights are unpacked as they are read.

        Raises UnsupportedModel where there is none, or one with weights in a format that cannot be read, and
        HubUnreachable where the hub is down.
        """
        return self._parsed[0]

    @property
    def is_packed(self) -> bool:
        """Whether config.json says that weights are stored in fewer bits; they are read as if they were not."""
        return self._parsed[2] is not None

    @cached_property
    def _parsed(self) -> tuple[PretrainedConfig, dict[str, Any] | None, PackedFormat | None]:
        """config.json without its `quantization_config`; that; and what it says: how weights are packed."""
        if _is_path(self.source) and not Path(self.source).is_dir():
            raise UnsupportedModel(
                f"model.source={self.source}: there is no such folder; give one with config.json and safetensors "
                "files, or the name of a model on the hub",
                source=self.source,
                key="model.source",
                seen=self.source,
            )
        if Path(self.source).is_dir() and not Path(self.source, "config.json").is_file():
            raise UnsupportedModel(
                f"model.source={self.source}: the folder has no config.json; save the model with "
                "model.save_pretrained(folder), or convert a GGUF file with: "
                "python -m petals_tune.model.convert FILE.gguf FOLDER",
                source=self.source,
                file="config.json",
            )
        what = f"model.source={self.source!r} is neither a folder with a config.json nor a model that the hub gave"
        with self._errors_explained(what, "config.json"):
            config = AutoConfig.from_pretrained(self._config_folder)
        options = take_quantization(config)
        return config, options, find_format(options, config, self.source)

    @cached_property
    def generation_config(self) -> GenerationConfig:
        """Options of generate(), of generation_config.json, or where there is none, of config.json, as older models do.

        Raises UnsupportedModel where the file is damaged.
        """
        path = self._find(_GENERATION)
        options: dict[str, Any] = (
            {} if path is not None else {"config_file_name": "config.json", "_from_model_config": True}
        )
        with self._errors_explained(f"model.source={self.source!r}: {_GENERATION} cannot be used", _GENERATION):
            return GenerationConfig.from_pretrained(self._config_folder if path is None else path.parent, **options)

    @cached_property
    def dtype(self) -> torch.dtype:
        """What `dtype="auto"` means in transformers: the config's dtype, else that of the first float tensor."""
        stored = getattr(self.config, "dtype", None) or getattr(text_config(self.config), "dtype", None)
        if isinstance(stored, torch.dtype):
            return stored
        for name, file in self._files.items():
            kind = tensors_in(self._path(file), [name])[name].kind
            if kind in FLOATS:
                return FLOATS[kind]
        return torch.float32

    @cached_property
    def commit(self) -> str:
        """The commit on the hub, of which all files are; "" for a local folder."""
        _ = self.config  # raises the right error where the source is wrong
        return "" if Path(self.source).is_dir() else self._config_folder.name

    @cached_property
    def _config_folder(self) -> Path:
        """The folder with config.json; for a model from a hub its name is the commit."""
        if Path(self.source).is_dir():
            return Path(self.source)
        try:
            found = cached_file(self.source, "config.json", **self._hub, **self._place)
            assert found is not None  # it raises where there is none
            return Path(found).parent
        except OSError:
            # In the library's own cache, where there is no network.
            here = try_to_load_from_cache(self.source, "config.json", revision=self.revision)
            if not isinstance(here, str):
                raise
            return Path(here).parent

    @cached_property
    def digest(self) -> str:
        """A name for the content of the model: `records.same_model` is true for all peers of a swarm.

        SHA-256 of config.json, less what does not belong to the architecture, and of the tensors' names. Where the hub
        lists the SHA-256 sums of the weights, a dot and the digest of those follow.
        """
        config = self.config.to_diff_dict()
        for local in ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache"):
            config.pop(local, None)
        if self._parsed[1] is not None:
            config["quantization_config"] = self._parsed[1]
        digest = _digest([config, sorted(self._files)])
        sums = self._sums_of_weights()
        return f"{digest}.{_digest(sums)}" if sums else digest

    @property
    def tensor_names(self) -> list[str]:
        """The names of the tensors of the model, packed ones by the names that they have in the model unpacked."""
        return list(self._parts)

    @property
    def stored_names(self) -> list[str]:
        """The names of the tensors as they stand in the files."""
        return list(self._files)

    def file_of(self, name: str) -> str:
        """Return the name of the file that holds the tensor `name`, or of one with a part of it."""
        return self._files[next(iter(self._parts[name].values()))]

    def state_of(self, names: Iterable[str]) -> list[Any]:
        """Return values that change when these tensors do: to name caches of them. Reads and downloads no tensor."""
        if self.commit:
            return [self.source, self.commit]
        files = {self._files[part] for name in names for part in self._parts[name].values()}
        paths = [self._path(file).resolve() for file in sorted(files)]
        files_state = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
        return files_state if self._parsed[1] is None else [*files_state, self._parsed[1]]

    def stored(self, names: Iterable[str], dtype: torch.dtype) -> dict[str, StoredTensor | PackedTensor]:
        """Return these tensors, to be read one by one as `dtype`. Opens only the files that hold them.

        Raises UnsupportedModel for tensors that are not what config.json says.
        """
        names, how = list(names), self._parsed[2]
        parts = self.parts(part for name in names for part in self._parts[name].values())
        tensors: dict[str, StoredTensor | PackedTensor] = {}
        for name in names:
            of_weight = {role: parts[part] for role, part in self._parts[name].items()}
            if how is not None and name in self._packed:
                shape = how.shape_of(of_weight)
                tensors[name] = PackedTensor(name=name, shape=shape, dtype=dtype, parts=of_weight, format=how)
            else:
                tensors[name] = replace(_checked(parts[name], is_packed=how is not None), dtype=dtype)
        return tensors

    def parts(self, stored_names: Iterable[str]) -> dict[str, StoredTensor]:
        """Return tensors by their names in the files, to be read one by one as they are stored."""
        by_file: dict[str, list[str]] = {}
        for name in stored_names:
            by_file.setdefault(self._files[name], []).append(name)
        tensors: dict[str, StoredTensor] = {}
        for file, wanted in by_file.items():
            tensors |= tensors_in(self._path(file), wanted)
        return tensors

    def read(self, names: Iterable[str], dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """Read these tensors; floating ones as `dtype`."""
        return {name: tensor[...] for name, tensor in self.stored(names, dtype).items()}

    @cached_property
    def _packed(self) -> dict[str, dict[str, str]]:
        """Packed weight -> role of a part -> its name in the files."""
        how = self._parsed[2]
        if how is None:
            check_unpacked(self._files, self.source)
            return {}
        return how.parts_of(self._files)

    @cached_property
    def _parts(self) -> dict[str, dict[str, str]]:
        """Tensor -> role -> name in the files, without the parts that are not needed to read it."""
        weights = {part: name for name, parts in self._packed.items() for part in parts.values()}
        found: dict[str, dict[str, str]] = {}
        for stored in self._files:
            name = weights.get(stored, stored)
            parts = self._packed.get(name, {"weight": stored})
            found[name] = {role: part for role, part in parts.items() if role != "unused"}
        return found

    @cached_property
    def _files(self) -> dict[str, str]:
        """Tensor name -> file name. Raises UnsupportedModel, HubUnreachable."""
        index = self._find(_INDEX)
        if index is not None:
            try:
                return dict(json.loads(index.read_text())["weight_map"])
            except (ValueError, KeyError):
                text = f"{index} is damaged: it is not an index of tensors"
                raise UnsupportedModel(text, source=self.source, file=_INDEX) from None
        single = self._find(_SINGLE)
        if single is None:
            raise UnsupportedModel(
                f"model.source={self.source!r} has neither {_SINGLE} nor {_INDEX}; "
                "save it with model.save_pretrained(folder), or convert a GGUF file with: "
                "python -m petals_tune.model.convert FILE.gguf FOLDER",
                source=self.source,
                file=_SINGLE,
            )
        try:
            with opened(single) as file:
                return dict.fromkeys(file.keys(), _SINGLE)
        except UnsupportedModel as error:
            raise UnsupportedModel(str(error), source=self.source, file=_SINGLE) from None

    @property
    def _place(self) -> dict[str, str]:
        return {} if self.disk is None else {"cache_dir": str(self.disk.hub)}

    @property
    def _hub(self) -> dict[str, Any]:
        return {"revision": self.revision, "token": self.token}

    def _path(self, file: str) -> Path:
        path = self._find(file)
        if path is None:
            text = f"model.source={self.source!r} lacks the file {file} that its index names"
            raise UnsupportedModel(text, source=self.source, file=file)
        return path

    def _find(self, file: str) -> Path | None:
        if Path(self.source).is_dir():
            path = Path(self.source) / file
            return path if path.is_file() else None
        revision = self.commit or None
        for place in (self._place, {}):  # the library's own cache may have it
            here = try_to_load_from_cache(self.source, file, revision=revision, **place)
            if isinstance(here, str):
                if self.disk is not None:
                    self.disk.used(Path(here).resolve())
                return Path(here)
        with self._errors_explained(f"model.source={self.source!r}: {file} was not downloaded", file):
            return self._downloaded(file, revision)

    def _downloaded(self, file: str, revision: str | None) -> Path | None:
        """Download `file`, resuming what an earlier process began; None where the hub has none. Checks the weights."""
        blob = None
        room: AbstractContextManager[None] = nullcontext()
        if file.endswith(".safetensors"):
            cache = Path(self._place.get("cache_dir", HF_HUB_CACHE))
            blob = Blob.of(self.source, file, revision=revision, cache=cache, token=self.token)
        if blob is not None and self.disk is not None:
            room = self.disk.room_for(blob.size_bytes, f"{self.source}: {file}", begun=blob.partial)
        with room:
            is_right = blob is not None and blob.fetch()
            found = cached_file(  # links a file that is there, and downloads one that is not
                self.source,
                file,
                _raise_exceptions_for_missing_entries=False,
                **{**self._hub, "revision": revision},
                **self._place,
            )
        if found is None:
            return None
        if not is_right:
            check(Path(found).resolve(), source=self.source, file=file)
        return Path(found)

    @contextmanager
    def _errors_explained(self, what: str, file: str) -> Iterator[None]:
        """Turn the library's errors into HubUnreachable where a later try may succeed, else into UnsupportedModel."""
        try:
            yield
        except PetalsTuneError:
            raise
        except (OSError, ValueError, HTTPError) as error:
            text = f"{what}: {_first_line(error)}"
            if _may_pass(error):
                text += "\n  try again when the hub can be reached: what was downloaded is kept"
                raise HubUnreachable(text, source=self.source, file=file) from None
            raise UnsupportedModel(text, source=self.source, file=file) from None

    def _sums_of_weights(self) -> list[str]:
        """The SHA-256 of each file of weights, in order; empty where the hub does not list all of them."""
        if not self.commit:
            return []
        try:
            info = HfApi(token=self.token).model_info(
                self.source, revision=self.commit, files_metadata=True, timeout=10
            )
        except (HfHubHTTPError, OfflineModeIsEnabled, OSError):
            return []
        sums = {file.rfilename: file.lfs.sha256 for file in info.siblings or () if file.lfs is not None}
        files = sorted({*self._files.values()})
        return [sums[file] for file in files] if sums.keys() >= {*files} else []


def _checked(tensor: StoredTensor, *, is_packed: bool) -> StoredTensor:
    """Raise UnsupportedModel for a weight that only looks as if it were stored in full."""
    is_number = tensor.kind in FLOATS or not tensor.name.endswith("weight")
    if not is_number and (is_packed or not tensor.kind.startswith("F8")):
        raise tensor.unfit("is not a weight in full, and nothing beside it says how to read it")
    return tensor


def _is_path(source: str) -> bool:
    """Whether `source` is a path, and not the name of a model on a hub, which is NAME or OWNER/NAME."""
    return source.startswith(("/", ".", "~")) or source.endswith("/") or source.count("/") > 1


def _may_pass(error: BaseException | None) -> bool:
    """Whether the network or the hub itself caused an error, so that a later try may succeed."""
    while error is not None:
        if isinstance(error, TransportError) or (
            isinstance(error, HfHubHTTPError) and error.response.status_code >= HTTPStatus.INTERNAL_SERVER_ERROR
        ):
            return True
        error = error.__cause__
    return False


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n", 1)[0]
