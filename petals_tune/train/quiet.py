"""Known noise of the libraries, each piece by its name. Everything that is not listed is shown."""

from __future__ import annotations

import logging
import os
import re
import sys
import warnings
from functools import partial

from lightning.fabric.utilities.rank_zero import rank_zero_only
from transformers.utils import logging as transformers_logging

_WARNINGS = {
    r"The '\w+_dataloader' does not have many workers": "the rows are encoded already: a worker has nothing to do",
    r"Experiment logs directory .* exists and is not empty": "the output folder is the run's own and new",
    r"Position ids are not supported for parameter efficient tuning": "PEFT drops them; the model makes them again",
    r"`is_gradient_checkpointing` is deprecated": "PEFT asks transformers in its old words",
    r"Checkpoint directory .* exists and is not empty": "the output folder again",
    r"`torch\.jit\.script` is deprecated": "hivemind, at import",
    r"`isinstance\(treespec, LeafSpec\)` is deprecated": "Lightning asks torch in its old words",
    r"'set_vital' is deprecated": "torchdata asks torch in its old words",
}

# What loggers warn of: logger -> a pattern of the message.
_SAID = {
    # A table with one line, the new head: it starts from the label words (ClassHead.start_head).
    "transformers.modeling_utils": r"LOAD REPORT.*\n.*\n[-+]+\n *score\.weight[^\n]*MISSING[^\n]*\n\n",
    # The position that the head reads is chosen by us.
    "transformers.modeling_layers": r"will not detect padding tokens in `inputs_embeds`",
}

# "GPU available: False", "max_steps reached", a tip for a cloud service: on INFO. Warnings still come through.
_LOGGERS = ("lightning.pytorch", "lightning.fabric")


def quiet() -> None:
    """Silence the noise above, in this process; and all lines of a run in the processes that only help another one."""
    if getattr(rank_zero_only, "rank", 0):
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # to the end of the process
    for message in _WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    for name, said in _SAID.items():
        logging.getLogger(name).addFilter(partial(_is_news, said))
    for name in _LOGGERS:
        logging.getLogger(name).setLevel(logging.WARNING)
    transformers_logging.disable_progress_bar()  # reading a model's few local tensors takes no time worth a bar


def _is_news(said: str, record: logging.LogRecord) -> bool:
    return re.search(said, record.getMessage()) is None
