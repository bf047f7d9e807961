"""What each session sees, by the library's own mask functions; and blocks whose attention cannot be taken apart."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import MethodType

import pytest
import torch
from torch.nn import functional as F
from transformers import LlamaConfig
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.masking_utils import causal_mask_function as causal
from transformers.masking_utils import chunked_causal_mask_function as chunked
from transformers.masking_utils import sliding_window_causal_mask_function as sliding

from petals_tune.blocks.engine import Engine
from petals_tune.blocks.generation.attention import NAME, NotApart, each_session_apart
from tests.models import relative_error
from tests.servers.parts import load
from tests.servers.steps import SPAN, hidden, outputs, session, step

ROWS, POSITIONS = [1, 2, 1], [9, 3, 0]
TOTAL = max(POSITIONS) + 1


@dataclass
class Pass:
    rows: list[int] = field(default_factory=lambda: list(ROWS))
    positions: list[int] = field(default_factory=lambda: list(POSITIONS))
    padded: list[bool] = field(default_factory=lambda: [True] * len(ROWS))
    mask_window: int | None = None


def padded() -> torch.Tensor:
    """The middle session's second row begins with padding, and the first session's row has a hole."""
    mask = torch.ones(sum(ROWS), TOTAL, dtype=torch.bool)
    mask[2, :2] = False
    mask[0, 4] = False
    return mask


@pytest.mark.parametrize("padding", [None, padded()], ids=["whole", "padded"])
@pytest.mark.parametrize(
    ("function", "window"),
    [(causal, None), (sliding(4), None), (sliding(4), 4), (chunked(4, torch.zeros(4, dtype=torch.long)), 4)],
    ids=["causal", "window", "kept window", "chunks"],
)
def test_each_row_sees_what_the_library_lets_it_see_at_its_own_position(function, window, padding):
    here = Pass(mask_window=window)
    with each_session_apart(LlamaConfig(attn_implementation="sdpa"), here):
        seen = ALL_MASK_ATTENTION_FUNCTIONS[NAME](
            batch_size=sum(ROWS), q_length=1, kv_length=1, mask_function=function, attention_mask=padding
        )
    first_row = 0
    for rows, position, visible in zip(ROWS, POSITIONS, seen, strict=True):
        for row in range(rows):
            number = first_row + row
            kept = torch.zeros(TOTAL, dtype=torch.bool)
            kept[visible.first : position + 1] = True if visible.mask is None else visible.mask[row]
            for key in range(TOTAL):
                wanted = key <= position and bool(
                    function(torch.tensor(number), 0, torch.tensor(position), torch.tensor(key))
                )
                wanted &= padding is None or bool(padding[number, key])
                assert bool(kept[key]) == wanted, (number, key)
        first_row += rows


def test_the_config_has_its_own_attention_again_afterwards():
    config = LlamaConfig(attn_implementation="sdpa")
    with pytest.raises(NotApart), each_session_apart(config, Pass()):
        ALL_MASK_ATTENTION_FUNCTIONS[NAME](batch_size=2, q_length=1, kv_length=1, mask_function=causal)
    assert config._attn_implementation == "sdpa"
    with pytest.raises(NotApart):
        ALL_MASK_ATTENTION_FUNCTIONS[NAME](batch_size=4, q_length=1, kv_length=1, mask_function=causal)


def test_blocks_that_compute_attention_themselves_are_found_and_share_steps_all_the_same(model_folder):
    engine = Engine(load(model_folder("llama"), str(SPAN)))
    assert engine.attention.apart
    own = Engine(load(model_folder("llama"), str(SPAN)))
    attention = own.block(SPAN.start).self_attn

    def by_itself(self, hidden_states, past_key_values=None, attention_mask=None, **_):
        """Without rotary positions: another attention than the family's."""
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query, key, value = (
            part(hidden_states).view(shape).transpose(1, 2) for part in (self.q_proj, self.k_proj, self.v_proj)
        )
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        mask = attention_mask
        if mask is None:
            mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).tril(key.shape[2] - query.shape[2])
        found = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)
        return self.o_proj(found.transpose(1, 2).flatten(2)), None

    attention.forward = MethodType(by_itself, attention)
    assert not own.attention.apart
    kept = [session(), session(2)]
    alone = [session(), session(2)]
    for pair in (kept, alone):
        for each, length in zip(pair, (7, 3), strict=True):
            outputs(own, (each, step(hidden(each.rows, length, length), 0)))
    steps = [step(hidden(1, 1, 1), 7), step(hidden(2, 1, 2), 3)]
    for one, found, each in zip(alone, outputs(own, *zip(kept, steps, strict=True)), steps, strict=True):
        assert relative_error(found, outputs(own, (one, each))[0]) < 1e-6
