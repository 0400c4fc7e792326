"""Drawing tokens: the right frequencies, from the given seed alone."""

import pytest
import torch

from posttrain.errors import ConfigError
from posttrain.rollouts.sampling import Sampling, draw, uniforms

PROBABILITIES = torch.tensor([0.5, 0.0, 0.3, 0.15, 0.05, 0.0])


def test_tokens_are_drawn_as_often_as_their_probability_says():
    """Each count within 4 standard deviations of n p; 100,000 draws."""
    count = 100_000
    uniform = torch.rand(count, generator=torch.Generator().manual_seed(0))
    tokens = draw(PROBABILITIES.log().expand(count, -1), uniform)
    found = torch.bincount(tokens, minlength=len(PROBABILITIES))
    deviation = (count * PROBABILITIES * (1 - PROBABILITIES)).sqrt()
    assert ((found - count * PROBABILITIES).abs() <= 4 * deviation).all()


def test_inverting_the_distribution_by_hand():
    """Cumulative 0.5, 0.5, 0.8, 0.95, 1, 1: a number picks the first token that exceeds it."""
    uniform = torch.tensor([0.0, 0.499, 0.5, 0.79, 0.81, 0.96])
    tokens = draw(PROBABILITIES.log().expand(len(uniform), -1), uniform)
    assert tokens.tolist() == [0, 0, 2, 2, 3, 4]


def test_a_token_of_probability_0_is_never_drawn_not_even_at_the_ends():
    """Random distributions whose first and last tokens are impossible, at the extreme numbers."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(20_000, 50, generator=generator)
    logits[:, :5] = logits[:, -5:] = -torch.inf
    log_probs = logits.log_softmax(-1)
    almost_one = torch.tensor(1.0).nextafter(torch.tensor(0.0))
    for extreme in (torch.tensor(0.0), almost_one):
        tokens = draw(log_probs, extreme.expand(len(logits)))
        assert log_probs.gather(1, tokens[:, None]).isfinite().all()


def test_a_prompts_numbers_come_from_its_own_seed_alone():
    alone, together = uniforms([7], 3, 5), uniforms([1, 7, 9], 3, 5)
    assert torch.equal(together[3:6], alone)
    assert len({tuple(row.tolist()) for row in together}) == 9  # no two answers share theirs


@pytest.mark.parametrize("settings", [{"temperature": -0.1}, {"max_tokens": 0}])
def test_settings_that_mean_nothing_are_refused(settings):
    with pytest.raises(ConfigError, match="expected temperature >= 0 and max_tokens >= 1"):
        Sampling(**{"max_tokens": 4, "stop_ids": (1,), **settings})
