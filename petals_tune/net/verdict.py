"""What several servers refused, and when their word is final. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

from petals_tune.errors import PetalsTuneError, Refused


def verdict(refused: Sequence[Refused], *, alone: bool) -> PetalsTuneError | None:
    """The error that ends work which servers `refused`, one each: what two of them say, or one, if it is there `alone`.

    Two agree where they name the same class of error. Servers that merely take less at once agree on nothing: where
    all of them do, and nobody else is there, the error is that of the one that takes most. None: others may do it.
    """
    if not refused:
        return None
    names = " and ".join(dict.fromkeys(each.peer for each in refused))
    if alone:
        largest = max(refused, key=lambda each: getattr(each.said, "max_length", None) or 0)
        return _final(largest, f"only server {names} was there to ask" if len(refused) == 1 else f"so say {names}")
    for one, other in combinations(reversed(refused), 2):
        if type(one) is type(other) is Refused and type(one.said) is type(other.said) and one.peer != other.peer:
            return _final(one, f"so say servers {other.peer} and {one.peer}")
    return None


def _final(refused: Refused, who: str) -> PetalsTuneError:
    said = refused.said
    assert said is not None
    return type(said)(f"{said}\n  {who}", **vars(said))
