"""A generation session as its user sees it, by the servers' own code in this process."""

from pathlib import Path
from typing import Any

import pytest
import torch

from petals_tune.errors import ConfigError, RequestRefused
from tests.models import VOCABULARY, plain_model
from tests.raising import raises

LENGTH, NEW = 9, 8


@pytest.fixture(scope="module")
def plain(folder: Path) -> Any:
    return plain_model(folder)


def text(rows: int, length: int, *, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def generated(model: Any, ids: torch.Tensor, **options: Any) -> torch.Tensor:
    length = {"max_new_tokens": NEW, "min_new_tokens": NEW}
    return model.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **length, **options)


def test_step_by_step_with_rollback(model, plain):
    ids = text(2, LENGTH)
    expected = plain(input_ids=ids).logits
    with torch.no_grad(), model.inference_session(max_length=32) as session:
        for _ in range(2):
            parts = [model(input_ids=part, past_key_values=session).logits for part in ids.split(4, dim=1)]
            torch.testing.assert_close(torch.cat(parts, dim=1), expected, rtol=1e-4, atol=1e-4)
            session.rollback(4)
            again = model(input_ids=ids[:, 4:], past_key_values=session).logits
            torch.testing.assert_close(again, expected[:, 4:], rtol=1e-4, atol=1e-4)
            session.rollback(0)
        with raises(ConfigError, key="rollback", seen=5):
            session.rollback(5)


def test_a_session_that_is_full_says_so_and_the_servers_go_on(model, plain):
    ids = text(1, LENGTH)
    with model.inference_session(max_length=12), raises(RequestRefused, reason="too long", max_length=13):
        generated(model, ids, do_sample=False)
    assert torch.equal(generated(model, ids, do_sample=False), generated(plain, ids, do_sample=False))


def test_a_session_is_used_for_generation_alone(model):
    ids = text(1, LENGTH)
    embeddings = model.get_input_embeddings()(ids).requires_grad_()
    with model.inference_session(max_length=16) as session:
        with raises(ConfigError, key="use_cache"):
            model(inputs_embeds=embeddings, past_key_values=session)
        with torch.no_grad():
            model(input_ids=ids, past_key_values=session)
        assert (session.position, session.get_seq_length()) == (LENGTH, LENGTH)


def test_a_session_that_was_closed_begins_anew(model, plain):
    ids = text(1, LENGTH)
    with torch.no_grad():
        expected = plain(input_ids=ids).logits
        session = model.remote_blocks.new_session(max_length=16)
        for _ in range(2):
            given = model(input_ids=ids, past_key_values=session).logits
            torch.testing.assert_close(given, expected, rtol=1e-4, atol=1e-4)
            session.close()
            assert session.position == 0


def test_a_text_that_parts_from_the_one_before_is_taken_up_where_they_part(model):
    with model.inference_session(max_length=32) as session:
        first = generated(model, text(1, LENGTH), do_sample=False)
        assert session.position == first.shape[1] - 1
        other = first.clone()
        other[:, 5] = (other[:, 5] + 1) % VOCABULARY
        assert session.expect(other).shape[1] == other.shape[1] - 5
        assert session.position == 5
