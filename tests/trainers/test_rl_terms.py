"""What RLTrainer adds to a loss or takes off a reward: KL, entropy, the off-policy mask; and
advantages of tokens."""

from functools import partial

import pytest
import torch

from posttrain.advantages import leave_one_out_advantages, reinforce_pp_advantages
from posttrain.errors import ConfigError
from posttrain.losses import kl_k1, kl_k2, off_policy_mask
from posttrain.rewards.call import Scoring
from posttrain.rollouts.options import Selection
from tests.conftest import make_model
from tests.trainers.tiny import change_rollouts, logged, make_trainer, prompts, weights

rl_trainer = partial(make_trainer, "rl")


def same(completions, **_):
    return [1.0] * len(completions)


def test_an_entropy_bonus_alone_raises_the_entropy(tmp_path):
    """All rewards are equal, so nothing else trains."""
    flat = {"rewards": {"same": (same, 1.0)}, "scoring": Scoring(num_workers=0)}
    still = rl_trainer(tmp_path, trainer=flat)
    bonus = rl_trainer(tmp_path, max_steps=5, trainer={**flat, "entropy_coef": 1.0})
    for trainer in (still, bonus):
        trainer.train()
    assert torch.equal(weights(still.model), weights(make_model()))
    entropy = logged(bonus, "entropy")
    assert entropy[-1] > entropy[0] + 0.05


def test_a_kl_in_the_reward_starts_at_0_and_holds_the_policy_back(tmp_path):
    free, held = (
        rl_trainer(
            tmp_path, max_steps=8, learning_rate=3e-3, adam_epsilon=1e-8,
            per_device_train_batch_size=64,
            trainer={
                "reward_kl_coef": coef, "advantage": leave_one_out_advantages,
                "prompts": prompts(16), "num_generations": 8,
            },
        )
        for coef in (1e-9, 1.0)
    )  # fmt: skip
    for trainer in (free, held):
        trainer.train()
    assert logged(free, "kl_per_completion")[0] == pytest.approx(0, abs=1e-5)
    assert sum(logged(held, "kl_per_completion")[-3:]) < 0.65 * sum(
        logged(free, "kl_per_completion")[-3:]
    )
    assert torch.equal(weights(free.reference), weights(make_model()))


def trained_with_reward_kl(tmp_path, seed: int, coef: float, tokens: int) -> torch.Tensor:
    """Weights after training; not divided by a standard deviation, in which rounding would show
    where rewards are equal."""
    settings = {
        "reward_kl_coef": coef,
        "max_tokens_per_microbatch": tokens,
        "advantage": leave_one_out_advantages,
    }
    trainer = rl_trainer(tmp_path, seed=seed, trainer=settings)
    trainer.train()
    return weights(trainer.model)


def test_the_kl_in_the_reward_does_not_depend_on_how_groups_are_cut(tmp_path):
    """Another token is sampled where its number lies within rounding of a boundary, which some
    processors meet: then another seed must agree."""
    trained = partial(trained_with_reward_kl, tmp_path)
    gaps = (trained(seed, 0.5, 16384) - trained(seed, 0.5, 24) for seed in (42, 43))
    assert any(gap.abs().max() < 1e-5 for gap in gaps)
    assert (trained(42, 0.5, 16384) - trained(42, 0.0, 16384)).abs().max() > 1e-3


def test_the_estimate_of_the_kl_in_the_loss_is_the_one_that_is_passed(tmp_path):
    """u^2/2 is not exp(-u) - 1 + u; both see the same policy on the second step."""
    values = {}
    for name, settings in {"k3": {}, "k2": {"kl": kl_k2}}.items():
        trainer = rl_trainer(tmp_path, max_steps=2, trainer={"beta": 1e-9, **settings})
        trainer.train()
        values[name] = logged(trainer, "kl")[1]
    assert values["k2"] > 0 < values["k3"]
    assert values["k2"] != pytest.approx(values["k3"], rel=1e-3)


def test_k1_in_the_loss_is_refused_for_it_has_no_gradient(tmp_path):
    with pytest.raises(ConfigError, match="belongs in the reward: reward_kl_coef"):
        rl_trainer(tmp_path, trainer={"beta": 0.1, "kl": kl_k1})


def test_one_completion_a_prompt_is_refused_where_it_is_compared_with_the_others(tmp_path):
    with pytest.raises(ConfigError, match=r"num_generations 1: .* at least 2 answers"):
        rl_trainer(tmp_path, trainer={"num_generations": 1})
    alone = {"num_generations": 1, "advantage": reinforce_pp_advantages}
    assert rl_trainer(tmp_path, trainer=alone).rollouts.num_generations == 1


@pytest.mark.parametrize("drop_truncated", [False, True])
def test_advantages_of_tokens_train(drop_truncated, tmp_path):
    """Whitened over the rollout's tokens, their mean is 0, and so is the first loss."""
    settings = {"advantage": reinforce_pp_advantages, "max_tokens_per_microbatch": 64}
    selection = Selection(drop_truncated=drop_truncated)
    trainer = rl_trainer(tmp_path, max_steps=1, trainer={**settings, "selection": selection})
    trainer.train()
    assert (abs(logged(trainer, "loss")[0]) < 1e-5) == (not drop_truncated)
    assert logged(trainer, "grad_norm")[0] > 1e-3


def sampled_with(change):
    """A change of completions: they claim other log-probs of sampling than their own."""

    def apply(completion):
        completion.sampler_logps[:] = [change(logp) for logp in completion.sampler_logps]

    return apply


@pytest.mark.parametrize("updates", [1, 2])
@pytest.mark.parametrize(
    ("change", "drops"),
    [(lambda x: x + 0.7, True), (lambda x: x + 0.3, False), (lambda _: float("nan"), False)],
    ids=["beyond the threshold", "within it", "unknown"],
)
def test_the_off_policy_mask_compares_with_the_probabilities_at_sampling(
    change, drops, updates, tmp_path
):
    """Bad completions with 0.7 nats a token more at sampling than now do not train, with one update
    per rollout too, where the ratio starts from the current policy."""
    seen = []

    def mask_of(*inputs):
        seen.append((off_policy_mask(*inputs, threshold=0.5), *inputs[2:]))
        return seen[-1][0]

    settings = {"off_policy_mask": mask_of, "updates_per_rollout": updates}
    trainer = rl_trainer(tmp_path, max_steps=updates, learning_rate=1e-5, trainer=settings)
    change_rollouts(trainer, sampled_with(change))
    trainer.train()
    bad = torch.cat([(mask * (a < 0)[:, None]).sum(1) for _, a, mask in seen]).sum()
    dropped = sum((mask - kept).sum() for kept, _, mask in seen)
    assert bad > 0
    assert dropped == (bad if drops else 0)
    assert (logged(trainer, "clip_share")[0] > 0.1) == drops
    assert logged(trainer, "grad_norm")[0] > 0
