"""`raises` as pytest has it, by the class of an error and its fields: a sentence may be improved without a test."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from petals_tune.errors import PetalsTuneError


@contextmanager
def raises(kind: type[PetalsTuneError], **fields: object) -> Iterator[pytest.ExceptionInfo[PetalsTuneError]]:
    """The block raises `kind` itself, not a subclass, and the error has these `fields`."""
    with pytest.raises(kind) as caught:
        yield caught
    assert type(caught.value) is kind, repr(caught.value)
    assert {name: getattr(caught.value, name) for name in fields} == fields
