import copy

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from petals_tune.model.convert import embedded_model


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    """The embedded model's: its chat template is ChatML."""
    return AutoTokenizer.from_pretrained(embedded_model())


@pytest.fixture
def bare(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The same vocabulary without a chat template, or with the one that a test gives it."""
    own = copy.deepcopy(tokenizer)
    own.chat_template = None
    return own
