"""Sampling tokens: the right frequencies, from the given seed alone."""

import pytest
import torch

from posttrain.errors import ConfigError
from posttrain.rollouts.sampling import Sampling, choose, restrict, sample_tokens, uniforms

PROBABILITIES = torch.tensor([0.5, 0.0, 0.3, 0.15, 0.05, 0.0])


def test_tokens_are_sampled_as_often_as_their_probability_says():
    """Each count within 4 standard deviations of n p; 100,000 samples."""
    count = 100_000
    uniform = torch.rand(count, generator=torch.Generator().manual_seed(0))
    tokens = sample_tokens(PROBABILITIES.log().expand(count, -1), uniform)
    found = torch.bincount(tokens, minlength=len(PROBABILITIES))
    deviation = (count * PROBABILITIES * (1 - PROBABILITIES)).sqrt()
    assert ((found - count * PROBABILITIES).abs() <= 4 * deviation).all()


def test_inverting_the_distribution_by_hand():
    """Cumulative 0.5, 0.5, 0.8, 0.95, 1, 1: a number picks the first token that exceeds it."""
    uniform = torch.tensor([0.0, 0.499, 0.5, 0.79, 0.81, 0.96])
    tokens = sample_tokens(PROBABILITIES.log().expand(len(uniform), -1), uniform)
    assert tokens.tolist() == [0, 0, 2, 2, 3, 4]


def test_a_token_of_probability_0_is_never_sampled_not_even_at_the_ends():
    """Random distributions whose first and last tokens are impossible, at the extreme numbers."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(20_000, 50, generator=generator)
    logits[:, :5] = logits[:, -5:] = -torch.inf
    log_probs = logits.log_softmax(-1)
    almost_one = torch.tensor(1.0).nextafter(torch.tensor(0.0))
    for extreme in (torch.tensor(0.0), almost_one):
        tokens = sample_tokens(log_probs, extreme.expand(len(logits)))
        assert log_probs.gather(1, tokens[:, None]).isfinite().all()


@pytest.mark.parametrize(
    "cumulative",
    [
        [0.5, 0.50001, 0.8, 0.95, 1.0, 1.00001],  # it rises at the impossible tokens 1 and 5
        [0.5, 0.49999, 0.8, 0.79999, 1.0, 0.99999],  # it falls
        [0.5, 0.81, 0.8, 0.95, 1.0, 1.0],  # both, by far more than any rounding
    ],
)
def test_a_cumulative_sum_that_is_not_monotone_gives_no_impossible_token(monkeypatch, cumulative):
    """As CUDA's parallel sum may be; every level that lies between two of the sums is tried."""
    levels = torch.linspace(0, 1 - 2**-24, 2001)
    levels = torch.cat((levels, torch.tensor(cumulative) - 3e-6)).clamp(0, 1 - 2**-24)
    made_up = torch.tensor(cumulative).expand(len(levels), -1).contiguous()
    monkeypatch.setattr(torch.Tensor, "cumsum", lambda *_, **__: made_up)
    tokens = sample_tokens(PROBABILITIES.log().expand(len(levels), -1), levels)
    assert (PROBABILITIES[tokens] > 0).all()


def test_a_prompts_numbers_come_from_its_own_seed_alone():
    alone, together = uniforms([7], 3, 5), uniforms([1, 7, 9], 3, 5)
    assert torch.equal(together[3:6], alone)
    assert len({tuple(row.tolist()) for row in together}) == 9  # no two completions share theirs


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"top_p": 0.6}, [0.625, 0.0, 0.375, 0.0, 0.0, 0.0]),  # 0.5 is short of it, 0.8 past it
        ({"top_p": 0.49}, [1.0, 0.0, 0.0, 0.0, 0.0, 0.0]),
        ({"top_p": 1e-9}, [1.0, 0.0, 0.0, 0.0, 0.0, 0.0]),  # the most likely token always stays
        ({"top_k": 3}, [0.5 / 0.95, 0.0, 0.3 / 0.95, 0.15 / 0.95, 0.0, 0.0]),
        ({"top_k": 99}, PROBABILITIES.tolist()),
        ({"top_k": 3, "top_p": 0.8}, [0.625, 0.0, 0.375, 0.0, 0.0, 0.0]),  # 0.8 / 0.95 > 0.8
        ({"top_k": 0, "top_p": 1.0}, PROBABILITIES.tolist()),
    ],
)
def test_restricting_by_hand(settings, expected):
    restricted = restrict(PROBABILITIES.log()[None], **settings)
    assert restricted.exp()[0].tolist() == pytest.approx(expected, abs=1e-6)


def test_what_is_kept_agrees_with_transformers():
    """Its warpers cut logits, ours log-probs; 200 random rows of 50 tokens."""
    from transformers import TopKLogitsWarper, TopPLogitsWarper

    logits = torch.randn(200, 50, generator=torch.Generator().manual_seed(0)) * 2
    ids = torch.zeros(200, 1, dtype=torch.long)
    warped = TopPLogitsWarper(0.85)(ids, TopKLogitsWarper(12)(ids, logits.clone()))
    ours = restrict(logits.log_softmax(-1), top_k=12, top_p=0.85)
    assert torch.allclose(ours.exp(), warped.softmax(-1), atol=1e-6)
    assert len(set((ours.isfinite().sum(1)).tolist())) > 3  # p cuts some rows more than others


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -0.1}, "temperature >= 0"),
        ({"max_tokens": 0}, "max_tokens >= 1"),
        ({"min_tokens": 5}, "min_tokens <= max_tokens"),
        ({"top_k": -1}, "top_k >= 0"),
        ({"top_p": 0.0}, "0 < top_p <= 1"),
        ({"top_p": 1.1}, "0 < top_p <= 1"),
        ({"stop_strings": ("",)}, "no empty stop string"),
        ({"vocabulary": 0}, "vocabulary >= 1"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings, message):
    with pytest.raises(ConfigError, match=f"expected .*{message}"):
        Sampling(**{"max_tokens": 4, "stop_ids": (1,), **settings})


@pytest.mark.parametrize("settings", [{}, {"top_k": 3}, {"min_tokens": 2}, {"temperature": 0.0}])
def test_ids_outside_the_tokenizer_are_never_sampled(settings):
    logits = torch.randn(500, 12, generator=torch.Generator().manual_seed(0))
    logits[:, 9:] += 5.0  # rows of the embedding that the tokenizer does not have
    uniform = torch.rand(500, generator=torch.Generator().manual_seed(1))
    sampling = Sampling(4, (1,), vocabulary=9, **settings)
    stops = torch.tensor([1])
    tokens, (own, sampled) = choose(logits, uniform, sampling, stops, 0)
    assert tokens.max() < 9
    assert torch.equal(
        own, logits.div(sampling.temperature or 1).log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    )
    within, (_, alone) = choose(logits[:, :9], uniform, sampling, stops, 0)
    assert torch.equal(tokens, within)
    assert torch.allclose(sampled, alone, atol=1e-5)
