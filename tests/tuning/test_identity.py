"""The identity of an adapter: written, read, and compared."""

from pathlib import Path

import pytest

from petals_tune.errors import ConfigError
from petals_tune.model.fingerprint import Fingerprint
from petals_tune.tuning.identity import FILE, Identity, Prompting, check_base, check_labels, check_task
from tests.raising import raises

BASE = Fingerprint(config="c", outside="o", blocks="b")


def identity(**changes: object) -> Identity:
    prompting = Prompting(system="Answer.", chat_template="{{ messages }}")
    values = {"source": "some/model", "task": "SEQ_CLS", "base": BASE, "prompting": prompting, "labels": (" a", " b")}
    return Identity(**{**values, **changes})  # type: ignore[arg-type]


def test_what_was_written_is_read(tmp_path: Path) -> None:
    assert Identity.read(tmp_path) is None
    identity().save(tmp_path)
    assert Identity.read(tmp_path) == identity()


@pytest.mark.parametrize("content", [b"{", b"{}", b'{"source": 3}', b"\xff"])
def test_a_damaged_file_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(content)
    with raises(ConfigError, key="adapter", seen=tmp_path / FILE):
        Identity.read(tmp_path)


@pytest.mark.parametrize(
    ("saved", "wanted"),
    [("SEQ_CLS", "CAUSAL_LM"), ("CAUSAL_LM", "SEQ_CLS"), (None, "SEQ_CLS"), ("TOKEN_CLS", "SEQ_CLS")],
)
def test_another_task_is_refused(saved: str | None, wanted: str) -> None:
    with raises(ConfigError, key="adapter", seen=saved or "CAUSAL_LM"):
        check_task(Path("x"), saved=saved, wanted=wanted)


def test_the_same_task_passes() -> None:
    check_task(Path("x"), saved=None, wanted="CAUSAL_LM")
    check_task(Path("x"), saved="SEQ_CLS", wanted="SEQ_CLS")


def test_labels_in_another_order_are_refused() -> None:
    check_labels(Path("x"), saved=(" a", " b"), wanted=(" a", " b"))
    check_labels(Path("x"), saved=(), wanted=(" a", " b"))
    with raises(ConfigError, key="objective.words", seen=(" b", " a")):
        check_labels(Path("x"), saved=(" a", " b"), wanted=(" b", " a"))


def test_another_model_is_refused() -> None:
    check_base(Path("x"), identity(), BASE, named="y")
    for part in ("config", "outside", "blocks"):
        other = Fingerprint(**{"config": "c", "outside": "o", "blocks": "b", part: "z"})
        with raises(ConfigError, key="model.source", seen="y"):
            check_base(Path("x"), identity(), other, named="y")
