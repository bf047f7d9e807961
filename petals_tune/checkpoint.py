"""A checkpoint in Hugging Face format, in a local folder or on a hub: read only the tensors that are asked for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, PretrainedConfig
from transformers.utils.hub import cached_file

from petals_tune.errors import UnsupportedModel

_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """`source` is a folder with config.json and safetensors files, or the name of a model on a hub."""

    source: str

    @cached_property
    def config(self) -> PretrainedConfig:
        """Raises UnsupportedModel where there is none."""
        try:
            return AutoConfig.from_pretrained(self.source)
        except (OSError, ValueError) as error:
            raise UnsupportedModel(
                f"model.source={self.source!r} is neither a folder with a config.json nor a model that the hub gave: "
                f"{_first_line(error)}"
            ) from None

    @cached_property
    def digest(self) -> str:
        """Names the model: equal for all servers and clients of a swarm. Source: the architecture's part of config.json
        and the names of its tensors."""
        config = self.config.to_diff_dict()
        for local in ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache"):
            config.pop(local, None)
        text = json.dumps([config, sorted(self._files)], sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def tensor_names(self) -> list[str]:
        return list(self._files)

    def read(self, names: Iterable[str], dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """These tensors; floating ones as `dtype`. Opens only the files that hold them."""
        by_file: dict[str, list[str]] = {}
        for name in names:
            by_file.setdefault(self._files[name], []).append(name)
        tensors = {}
        for file, wanted in by_file.items():
            path = self._path(file)
            try:
                with safe_open(path, framework="pt") as opened:
                    for name in wanted:
                        tensor = opened.get_tensor(name)
                        tensors[name] = tensor.to(dtype) if tensor.is_floating_point() else tensor
            except (SafetensorError, OSError) as error:
                raise UnsupportedModel(f"{path} is damaged or does not fit its index: {error}") from None
        return tensors

    @cached_property
    def _files(self) -> dict[str, str]:
        """tensor name -> file name."""
        index = self._find(_INDEX)
        if index is not None:
            try:
                return dict(json.loads(index.read_text())["weight_map"])
            except (ValueError, KeyError):
                raise UnsupportedModel(f"{index} is damaged: it is not an index of tensors") from None
        single = self._find(_SINGLE)
        if single is None:
            raise UnsupportedModel(
                f"model.source={self.source!r} has neither {_SINGLE} nor {_INDEX}; "
                "save it with model.save_pretrained(folder), or convert a GGUF file with: "
                "python -m petals_tune.convert FILE.gguf FOLDER"
            )
        try:
            with safe_open(single, framework="pt") as opened:
                return dict.fromkeys(opened.keys(), _SINGLE)
        except SafetensorError as error:
            raise UnsupportedModel(f"{single} is damaged: {error}") from None

    def _path(self, file: str) -> Path:
        path = self._find(file)
        if path is None:
            raise UnsupportedModel(f"model.source={self.source!r} lacks the file {file} that its index names")
        return path

    def _find(self, file: str) -> Path | None:
        if Path(self.source).is_dir():
            path = Path(self.source) / file
            return path if path.is_file() else None
        try:
            found = cached_file(self.source, file, _raise_exceptions_for_missing_entries=False)
        except OSError as error:
            raise UnsupportedModel(f"model.source={self.source!r}: {_first_line(error)}") from None
        return Path(found) if found else None


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n", 1)[0]
