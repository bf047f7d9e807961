"""A generation session as its user sees it, by the servers' own code in this process."""

import copy
import pickle
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from petals_tune import AutoDistributedModelForCausalLM
from petals_tune.errors import ConfigError, RequestRefused
from tests.models import VOCABULARY, plain_model
from tests.parity import remote
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


def same(model: Any, plain: Any, ids: torch.Tensor, mask: torch.Tensor | None = None, **options: Any) -> None:
    """The model gives the plain one's tokens, whatever its session holds."""
    session = {"past_key_values": options.pop("past_key_values", None)}
    mask = torch.ones_like(ids) if mask is None else mask
    options = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, **options}
    found = model.generate(ids, attention_mask=mask, **options, **session)
    assert torch.equal(found, plain.generate(ids, attention_mask=mask, **options))


def padded(rows: int, length: int, *amounts: int) -> torch.Tensor:
    """A mask with `amounts` of padding on the left of the rows."""
    counted = torch.arange(length).expand(rows, -1)
    return (counted >= torch.tensor(amounts)[:, None]).long()


@pytest.mark.parametrize(
    ("later", "mask"),
    [
        (text(3, LENGTH, seed=1), None),
        (text(2, LENGTH), padded(2, LENGTH, 0, 3)),
        (text(2, LENGTH), padded(2, LENGTH, 2, 0)),
        (text(2, 4, seed=2), padded(2, 4, 1, 0)),
    ],
    ids=["more rows", "hidden where it was seen", "another row hidden", "another text"],
)
def test_a_later_turn_with_other_rows_or_another_mask_is_computed_as_by_itself(model, plain, later, mask):
    with model.inference_session(max_length=64):
        same(model, plain, text(2, LENGTH), padded(2, LENGTH, 0, 0))
        same(model, plain, later, mask)
        same(model, plain, text(2, LENGTH), padded(2, LENGTH, 0, 4), num_beams=2)
        same(model, plain, text(2, LENGTH), padded(2, LENGTH, 0, 3))


def test_steps_by_hand_with_other_rows_or_another_mask_are_refused(model):
    ids, mask = text(2, LENGTH), padded(2, LENGTH, 0, 3)
    with torch.no_grad(), model.inference_session(max_length=32) as session:
        model(input_ids=ids, attention_mask=mask, past_key_values=session)
        for rows, given, key in (
            (1, None, "past_key_values"),
            (2, None, "attention_mask"),
            (2, padded(2, LENGTH + 1, 0, 2), "attention_mask"),
            (2, padded(2, 1, 0, 0), "attention_mask"),
        ):
            with raises(ConfigError, key=key):
                model(input_ids=ids[:rows, :1], attention_mask=given, past_key_values=session)
        assert session.position == LENGTH
        model(input_ids=ids[:, :1], attention_mask=padded(2, LENGTH + 1, 0, 3), past_key_values=session)


def test_what_was_stepped_by_hand_is_known_to_a_turn(model, plain):
    ids = text(2, LENGTH)
    with torch.no_grad(), model.inference_session(max_length=32) as session:
        model(input_ids=ids, past_key_values=session)
        assert torch.equal(session.ids, ids)
        sent = model.remote_blocks.stats.sent_bytes
        whole = torch.cat([ids, text(2, 1, seed=3)], dim=1)
        same(model, plain, whole, max_new_tokens=1)
        assert model.remote_blocks.stats.sent_bytes - sent < 2 * LENGTH * 32 * 4, "one position to each of two servers"


def test_what_a_refused_call_was_given_is_not_taken_for_seen(model, plain):
    ids, other = text(1, LENGTH), text(1, LENGTH, seed=5)
    with torch.no_grad(), model.inference_session(max_length=32) as session:
        with raises(ConfigError, key="output_attentions"):
            model(input_ids=other, past_key_values=session, output_attentions=True)
        with raises(ConfigError, key="output_attentions"):
            model.generate(other, attention_mask=torch.ones_like(other), output_attentions=True, max_new_tokens=2)
        model(input_ids=ids, past_key_values=session)
        assert torch.equal(session.ids, ids)
        same(model, plain, torch.cat([other, other], dim=1))


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"max_new_tokens": 20}], ids=str)
def test_a_text_may_be_given_as_embeddings(model, plain, options):
    ids, mask = text(2, LENGTH), padded(2, LENGTH, 0, 3)
    options = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, "attention_mask": mask, **options}
    embeddings = plain.get_input_embeddings()(ids)
    wanted = plain.generate(inputs_embeds=embeddings, **options)
    assert torch.equal(model.generate(inputs_embeds=embeddings, **options), wanted)
    with model.inference_session(max_length=64) as session:
        for _ in range(2):
            assert torch.equal(model.generate(inputs_embeds=embeddings, **options), wanted)
        assert session.ids is None, "whose tokens these were is not known"
        same(model, plain, ids, mask)


def test_a_session_goes_on_with_the_adapter_that_is_active(model, folder):
    """generate() computes anew where the adapter was changed; a step by hand is refused."""
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["query_key_value"], init_lora_weights=False)
    nets = []
    for each in (model, plain_model(folder)):
        torch.manual_seed(1)
        nets.append(peft.get_peft_model(each, config).eval())
    net, local = nets
    ids = text(2, LENGTH)
    with model.inference_session(max_length=64) as session:
        for factor in (1.0, -3.0):
            for each in nets:
                for name, parameter in each.named_parameters():
                    if "lora_B" in name:
                        parameter.data.mul_(factor)
            same(net, local, ids)
        with net.disable_adapter(), torch.no_grad(), raises(ConfigError, key="past_key_values"):
            net(input_ids=ids[:, :1], past_key_values=session)
        with net.disable_adapter(), local.disable_adapter():
            same(net, local, ids)


def test_options_of_a_local_cache_change_nothing(model, plain):
    first, second = text(2, LENGTH), torch.cat([text(2, LENGTH), text(2, LENGTH, seed=4)], dim=1)
    options = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    with model.inference_session(max_length=64):
        for ids in (first, second):
            wanted = plain.generate(ids, attention_mask=torch.ones_like(ids), **options)
            local = {"prefill_chunk_size": 4, "cache_implementation": "static"}
            assert torch.equal(model.generate(ids, attention_mask=torch.ones_like(ids), **local, **options), wanted)


def test_a_session_of_another_model_is_refused_and_that_of_a_copy_is_not(model, folder):
    with torch.no_grad(), remote(AutoDistributedModelForCausalLM, folder) as other:
        copied = copy.deepcopy(other)
        with other.inference_session(max_length=16) as session:
            with raises(ConfigError, key="past_key_values"):
                model(input_ids=text(1, 3), past_key_values=session)
            copied(input_ids=text(1, 3), past_key_values=session)
            assert session.position == 3


def test_a_copy_of_a_session_is_a_fork_as_transformers_users_copy_the_cache_of_a_prompt(model, plain, steps):
    """https://huggingface.co/docs/transformers/kv_cache, "Prefill a cache"."""
    prompt = text(1, LENGTH)
    with model.inference_session(max_length=32) as session:
        with torch.no_grad():
            model(input_ids=prompt, past_key_values=session)
        for seed in (1, 2):
            whole = torch.cat([prompt, text(1, 3, seed=seed)], dim=1)
            steps.clear()
            found = generated(model, whole, past_key_values=copy.deepcopy(session), do_sample=False)
            assert torch.equal(found, generated(plain, whole, do_sample=False))
            assert steps == [(1, 3)] * 2 + [(1, 1)] * 2 * (NEW - 1), "what is new, to each of two servers"
        assert session.position == LENGTH
        with raises(ConfigError, key="past_key_values"):
            copy.copy(session)
        with raises(ConfigError, key="past_key_values"):
            pickle.dumps(session)


SEVERAL = [
    {"num_beams": 3, "num_return_sequences": 2},
    {"do_sample": True, "num_return_sequences": 3, "top_k": 5},
]


@pytest.mark.parametrize("options", SEVERAL, ids=str)
def test_a_prompt_of_several_beams_or_samples_is_sent_and_computed_once(model, plain, steps, options):
    ids, stats, before = text(2, 40), model.remote_blocks.stats, model.remote_blocks.stats.sent_bytes
    found, wanted = (seeded(each, ids, **options) for each in (model, plain))
    assert torch.equal(found, wanted)
    assert steps[:2] == [(2, 40)] * 2
    assert all(positions == 1 for _, positions in steps[2:])
    later = sum(rows for rows, _ in steps[2:])
    hidden_bytes = 32 * 4
    assert stats.sent_bytes - before < (2 * 2 * 40 + later) * hidden_bytes + len(steps) * 250


def seeded(model: Any, ids: torch.Tensor, **options: Any) -> torch.Tensor:
    torch.manual_seed(3)
    return generated(model, ids, **{"do_sample": False, **options})


def test_conversations_go_on_from_one_system_prompt(model, plain, steps):
    """Several at once, of rows that a single one is multiplied to, and with other endings of some."""
    system = text(1, LENGTH)
    chats = torch.cat([system.expand(3, -1), text(3, 4, seed=5)], dim=1)
    with model.inference_session(max_length=64) as session:
        with torch.no_grad():
            model(input_ids=system, past_key_values=session)
        steps.clear()
        with session.fork() as forked:
            found = generated(model, chats, past_key_values=forked, do_sample=False)
            assert torch.equal(found, generated(plain, chats, do_sample=False))
            assert steps[:2] == [(3, 4)] * 2
            steps.clear()
            fewer = torch.cat([found[[2, 0]], text(2, 2, seed=6)], dim=1)
            same(model, plain, fewer, past_key_values=forked)
            assert steps[:2] == [(2, 3)] * 2
            more = torch.cat([found[[2, 0, 0, 1]][:, : LENGTH + 2], text(4, 2, seed=7)], dim=1)
            same(model, plain, more, past_key_values=forked)
        same(model, plain, torch.cat([system, text(1, 4, seed=8)], dim=1))
        assert session.position == LENGTH + 4 + NEW - 1


def test_a_fork_with_a_soft_prompt(model, folder):
    nets = []
    for each in (model, plain_model(folder)):
        net = peft.get_peft_model(each, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)).eval()
        net.prompt_encoder["default"].embedding.weight.data.normal_(generator=torch.Generator().manual_seed(1))
        nets.append(net)
    net, local = nets
    ids = text(1, LENGTH)
    given = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    with model.inference_session(max_length=64) as session:
        first = net.generate(input_ids=ids, **given)
        assert torch.equal(first, local.generate(input_ids=ids, **given))
        for seed in (1, 2):
            whole = torch.cat([first.repeat(2, 1), text(2, 2, seed=seed)], dim=1)
            with session.fork() as forked:
                found = net.generate(input_ids=whole, past_key_values=forked, max_new_tokens=3, do_sample=False)
            wanted = local.generate(input_ids=whole, max_new_tokens=3, do_sample=False)
            assert torch.equal(found, wanted)
