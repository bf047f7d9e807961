"""Choices of tokens against the distributions that the options describe."""

import pytest
import torch

from petals_tune.errors import ConfigError
from petals_tune.service.decoding.options import DecodingOptions
from petals_tune.service.decoding.sampler import Sampler
from tests.raising import raises

LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0])


def shares(count=5000, **options):
    sampler = Sampler(DecodingOptions(max_tokens=count, seed=0, **options), len(LOGITS))
    tokens = torch.tensor([sampler.choose(LOGITS).token for _ in range(count)])
    return torch.bincount(tokens, minlength=len(LOGITS)) / count


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_temperature(temperature):
    expected = (LOGITS / temperature).softmax(-1)
    torch.testing.assert_close(shares(temperature=temperature), expected, atol=0.03, rtol=0)


def test_temperature_0_is_the_most_likely():
    assert shares(count=5, temperature=0).tolist() == [1, 0, 0, 0]


@pytest.mark.parametrize("temperature", [1e-40, 1e-7, 1e-3])
def test_a_low_temperature_is_the_most_likely_too(temperature):
    assert shares(count=5, temperature=temperature).tolist() == [1, 0, 0, 0]


def test_top_p_and_top_k_keep_the_most_likely():
    two = torch.cat([LOGITS[:2].softmax(-1), torch.zeros(2)])
    torch.testing.assert_close(shares(top_k=2), two, atol=0.03, rtol=0)
    torch.testing.assert_close(shares(top_p=0.8), two, atol=0.03, rtol=0)  # the first one has 0.64, both 0.88


def test_bias():
    assert shares(count=20, logit_bias={0: -100.0, 1: -100.0, 2: -100.0}).tolist() == [0, 0, 0, 1]
    with raises(ConfigError, key="logit_bias", seen=9):
        Sampler(DecodingOptions(max_tokens=1, logit_bias={9: 1.0}), len(LOGITS))


def test_penalties_count_the_answers_own_tokens():
    sampler = Sampler(DecodingOptions(max_tokens=9, temperature=0, frequency_penalty=0.75), len(LOGITS))
    # 2, then 1.25 and 0.5 after one and two times: token 1 (1.0) comes after two of token 0, and so on.
    assert [sampler.choose(LOGITS).token for _ in range(4)] == [0, 0, 1, 0]
    sampler = Sampler(DecodingOptions(max_tokens=9, temperature=0, presence_penalty=1.5), len(LOGITS))
    assert [sampler.choose(LOGITS).token for _ in range(4)] == [0, 1, 0, 0]


def test_a_seed_gives_the_same_answer_and_none_another():
    def drawn(seed):
        sampler = Sampler(DecodingOptions(max_tokens=64, seed=seed), len(LOGITS))
        return [sampler.choose(LOGITS).token for _ in range(64)]

    assert drawn(7) == drawn(7) != drawn(8)
    assert drawn(None) != drawn(None)


def test_logprobs_are_the_models_own():
    options = DecodingOptions(max_tokens=1, temperature=0, logprobs=2, logit_bias={3: 100.0})
    choice = Sampler(options, len(LOGITS)).choose(LOGITS)
    expected = LOGITS.log_softmax(-1).tolist()
    assert choice.token == 3
    assert choice.logprob == pytest.approx(expected[3])
    assert choice.top == ((0, pytest.approx(expected[0])), (1, pytest.approx(expected[1])))


def test_logits_stay_as_they_are():
    logits = LOGITS.clone()
    Sampler(DecodingOptions(max_tokens=1, logit_bias={0: 5.0}), len(LOGITS)).choose(logits)
    assert torch.equal(logits, LOGITS)
