"""Damage to files, as a disk or a copy does it."""

from pathlib import Path


def flip_bit(path: Path, byte: int, bit: int = 0) -> None:
    """Flip one bit in place; `byte` may count from the end."""
    with path.open("r+b") as file:
        file.seek(byte, 0 if byte >= 0 else 2)
        at = file.tell()
        (value,) = file.read(1)
        file.seek(at)
        file.write(bytes([value ^ 1 << bit]))
