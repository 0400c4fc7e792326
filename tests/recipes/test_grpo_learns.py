"""It learns: every algorithm of the recipe's table makes a tiny LLaMA write even numbers."""

from typing import get_args

import pytest

from posttrain.rewards.call import Scoring
from recipes import grpo
from tests.trainers.tiny import logged, make_trainer, prompts


@pytest.mark.parametrize("name", get_args(grpo.Name))
def test_it_learns(name, tmp_path):
    """12 steps of 64 answers, two updates a rollout: from a half up, clear of the noise of 0.02."""
    algorithm = grpo.algorithms()[name]
    trainer = make_trainer(
        "rl", tmp_path, max_steps=12, per_device_train_batch_size=64, adam_epsilon=1e-8,
        trainer={
            "scoring": Scoring(num_workers=0), "prompts": prompts(16), "per": algorithm.per,
            "num_generations": 8, "updates_per_rollout": 2,
            "advantage": algorithm.advantage, "loss": algorithm.loss,
        },
    )  # fmt: skip
    trainer.train()
    rewards = logged(trainer, "reward")
    assert 0.2 < rewards[0] < 0.7
    assert sum(rewards[-2:]) / 2 > rewards[0] + 0.1


@pytest.mark.parametrize(
    ("names", "table"),
    [
        (grpo.Name, grpo.algorithms),
        (grpo.KL, grpo.kl_estimates),
        (grpo.Correction, grpo.corrections),
    ],
)
def test_flags_name_the_rows_of_their_tables(names, table):
    assert list(get_args(names)) == list(table())
