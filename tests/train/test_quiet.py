import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import closing, contextmanager

import pytest
from lightning.fabric.utilities.rank_zero import rank_zero_only

from petals_tune.train.quiet import silence_known_warnings

KNOWN = "The 'train_dataloader' does not have many workers which may be a bottleneck."


@contextmanager
def restored_logging() -> Iterator[None]:
    """Undo what `silence_known_warnings` changes in the process."""
    loggers = [logging.getLogger(name) for name in ("transformers.modeling_utils", "transformers.modeling_layers")]
    lightning = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    filters, levels = [list(logger.filters) for logger in loggers], [logger.level for logger in lightning]
    with warnings.catch_warnings():
        yield
    for logger, before in zip(loggers, filters, strict=True):
        logger.filters = before
    for logger, level in zip(lightning, levels, strict=True):
        logger.setLevel(level)


def test_known_warnings_are_silent_and_others_are_not() -> None:
    with restored_logging(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        silence_known_warnings()
        warnings.warn(KNOWN, stacklevel=1)
        warnings.warn("The data loader is empty.", stacklevel=1)
    assert [str(warning.message) for warning in caught] == ["The data loader is empty."]


def test_known_log_messages_are_silent_and_others_are_not() -> None:
    logger = logging.getLogger("transformers.modeling_layers")
    messages = ["Llama will not detect padding tokens in `inputs_embeds`.", "Llama has no head."]
    with restored_logging():
        silence_known_warnings()
        records = [logger.makeRecord(logger.name, logging.WARNING, "", 0, message, (), None) for message in messages]
        assert [bool(logger.filter(record)) for record in records] == [False, True]


@pytest.mark.parametrize(("rank", "printed"), [(0, "loss 1.0\n"), (1, "")])
def test_further_ranks_print_nothing(
    rank: int, printed: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(rank_zero_only, "rank", rank)
    monkeypatch.setattr(sys, "stdout", sys.stdout)  # put back at the end
    with restored_logging():
        silence_known_warnings()
        print("loss 1.0")
        if rank:
            with closing(sys.stdout):
                pass
    assert capsys.readouterr().out == printed
