"""RLTrainer on completions that were selected, or sampled from another distribution than the
policy's."""

from functools import partial

import pytest
import torch

from posttrain.errors import ConfigError
from posttrain.losses import tis_weights
from posttrain.rollouts.options import Selection
from posttrain.rollouts.sampling import Sampling
from tests.conftest import EOS
from tests.trainers.tiny import MAX_COMPLETION, even_share, logged, make_trainer, weights

rl_trainer = partial(make_trainer, "rl")


def test_without_a_gap_between_sampling_and_training_a_correction_changes_nothing(tmp_path):
    runs = []
    for name, correction in (("plain", None), ("corrected", tis_weights)):
        trainer = rl_trainer(tmp_path / name, trainer={"correction": correction})
        trainer.train()
        runs.append(weights(trainer.model))
    assert torch.allclose(*runs, atol=1e-5)
    assert logged(trainer, "correction") == pytest.approx([1.0] * 3, abs=1e-4)


def test_a_correction_sees_the_probabilities_that_were_sampled_from(tmp_path):
    """With top-k 5, π_old / π_sampled is the five tokens' share of the policy's probability."""
    seen = []

    def weigh(old_logps, sampler_logps, mask):
        seen.append(((sampler_logps - old_logps) * mask)[mask.bool()])
        return tis_weights(old_logps, sampler_logps, mask)

    sampling = Sampling(MAX_COMPLETION, (EOS, 2, 3), top_k=5)
    trainer = rl_trainer(tmp_path, max_steps=1, trainer={"sampling": sampling, "correction": weigh})
    trainer.train()
    (gaps,) = seen
    assert gaps.min() > 0.1  # the other 92 tokens have some probability
    assert logged(trainer, "correction")[0] == pytest.approx((-gaps).exp().mean().item())
    with pytest.raises(ConfigError, match="completions come from another distribution"):
        rl_trainer(tmp_path / "without", trainer={"sampling": sampling})


def test_groups_of_equal_rewards_are_refilled_in_training(tmp_path):
    """A reward that is 1 for every completion to most prompts: refills bring more that differ."""
    shares = []
    for refills in (0, 4):
        settings = {
            "rewards": {"r": (differs_for_some_prompts, 1.0)},
            "selection": Selection(max_refills=refills, signal_of="r"),
        }
        trainer = rl_trainer(tmp_path / str(refills), trainer=settings)
        trained = []
        original = trainer.microbatch_loss

        def remember(model, groups, original=original, trained=trained):
            trained.extend(bool(group.advantages.abs().max() > 0) for group in groups)
            return original(model, groups)

        trainer.microbatch_loss = remember
        trainer.train()
        shares.append(sum(trained) / len(trained))
    assert shares[0] < 0.7
    assert shares[1] > shares[0] + 0.2


def differs_for_some_prompts(completions, *, target, **_):
    scores = even_share(completions)
    return [score if t < 3 else 1.0 for score, t in zip(scores, target, strict=True)]


def test_a_signal_of_an_unknown_reward_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="signal_of to name a reward"):
        rl_trainer(tmp_path, trainer={"selection": Selection(signal_of="acuracy")})
