"""Known noise of the libraries, each piece by its name. Everything that is not listed is shown."""

from __future__ import annotations

import logging
import os
import sys
import warnings

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

# "GPU available: False", "max_steps reached", a tip for a cloud service: on INFO. Warnings still come through.
_LOGGERS = ("lightning.pytorch", "lightning.fabric")


def quiet() -> None:
    """Silence the noise above, in this process; and all lines of a run in the processes that only help another one."""
    if getattr(rank_zero_only, "rank", 0):
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # to the end of the process
    for message in _WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    for name in _LOGGERS:
        logging.getLogger(name).setLevel(logging.WARNING)
    transformers_logging.disable_progress_bar()  # reading a model's few local tensors takes no time worth a bar
