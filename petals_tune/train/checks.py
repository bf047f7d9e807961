"""Checks of a run's options before a server starts: what Lightning, torch or PEFT would refuse in the middle of a run."""

from __future__ import annotations


from petals_tune.train.parts import Parts


def check_run(parts: Parts, *, steps_done: int = 0) -> None:
    pass
