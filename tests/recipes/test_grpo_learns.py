"""It learns: every algorithm of the recipe's table makes a tiny LLaMA write even numbers."""

from functools import partial

import pytest

from posttrain import advantages, losses
from posttrain.rewards.call import Scoring
from recipes.grpo import ALGORITHMS, SETTINGS
from tests.trainers.tiny import logged, make_trainer, prompts


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_it_learns(algorithm, tmp_path):
    """12 steps of 64 answers, two updates a rollout: from a half up, clear of the noise of 0.02."""
    advantage, loss, per = ALGORITHMS[algorithm]
    trainer = make_trainer(
        "rl", tmp_path, max_steps=12, per_device_train_batch_size=64, adam_epsilon=1e-8,
        trainer={
            "scoring": Scoring(num_workers=0), "prompts": prompts(16), "per": per,
            "num_generations": 8, "updates_per_rollout": 2,
            "advantage": getattr(advantages, advantage),
            "loss": partial(getattr(losses, loss), **SETTINGS.get(algorithm, {})),
        },
    )  # fmt: skip
    trainer.train()
    rewards = logged(trainer, "reward")
    assert 0.2 < rewards[0] < 0.7
    assert sum(rewards[-2:]) / 2 > rewards[0] + 0.1
