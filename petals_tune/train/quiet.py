"""Known warnings and log messages of libraries that are not shown, each with its reason."""

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
    r"Position ids are not supported for parameter efficient tuning": "PEFT drops them; the model computes them again",
    r"`is_gradient_checkpointing` is deprecated": "PEFT still uses this name of transformers",
    r"Checkpoint directory .* exists and is not empty": "the output folder again",
    r"`torch\.jit\.script` is deprecated": "hivemind, at import",
    r"`isinstance\(treespec, LeafSpec\)` is deprecated": "Lightning still uses this name of torch",
    r"'set_vital' is deprecated": "torchdata still uses this name of torch",
}

# Logger -> pattern of the message.
_LOG_MESSAGES = {
    # A table with one line, the new head, which ClassHead.initialize_head initializes.
    "transformers.modeling_utils": r"LOAD REPORT.*\n.*\n[-+]+\n *score\.weight[^\n]*MISSING[^\n]*\n\n",
    # We select the position that is the head's input (objective.class_logits).
    "transformers.modeling_layers": r"will not detect padding tokens in `inputs_embeds`",
}

# On INFO they log "GPU available: False", "max_steps reached" and a tip for a cloud service. Warnings are still shown.
_LOGGERS = ("lightning.pytorch", "lightning.fabric")


def silence_known_warnings() -> None:
    """Silence the messages above in this process, and all that a run prints in processes of a rank other than 0."""
    if getattr(rank_zero_only, "rank", 0):
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # until the process ends
    for message in _WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    for name, pattern in _LOG_MESSAGES.items():
        logging.getLogger(name).addFilter(partial(_is_unknown, pattern))
    for name in _LOGGERS:
        logging.getLogger(name).setLevel(logging.WARNING)
    transformers_logging.disable_progress_bar()  # loading the few local tensors of a model takes no time


def _is_unknown(pattern: str, record: logging.LogRecord) -> bool:
    return re.search(pattern, record.getMessage()) is None
