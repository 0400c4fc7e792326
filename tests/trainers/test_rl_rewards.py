"""RLTrainer and its rewards: what cannot be scored is left out and said, gates reach the totals."""

import pytest

from posttrain.errors import ConfigError
from posttrain.rewards.call import Scoring
from tests.trainers.tiny import even_share, logged, make_trainer, prompts


def even_target(target):
    """Rows that `by_target` says it cannot score."""
    return [(row, f"target {value} is even") for row, value in enumerate(target) if value % 2 == 0]


def by_target(*, target, **_):
    assert all(value % 2 for value in target)
    return [float(value) for value in target]


by_target.find_unscorable = even_target


def mostly_odd(count=40):
    """Two rows of forty have an even target."""
    rows = prompts(count).to_list()
    for number, row in enumerate(rows):
        row["target"] = 2 if number in (3, 17) else 5
    return prompts(1).from_list(rows)


def test_prompts_that_cannot_be_scored_are_left_out_and_said(tmp_path, capsys):
    settings = {"prompts": mostly_odd(), "rewards": {"r": (by_target, 1.0)}}
    trainer = make_trainer("rl", tmp_path, trainer=settings)
    assert len(trainer.train_dataset) == 38
    assert set(trainer.train_dataset["target"]) == {5}
    said = capsys.readouterr().out
    assert "2 of 40 prompts cannot be scored" in said
    assert "r: target 2 is even. They are left out." in said
    trainer.train()
    assert logged(trainer, "reward") == [5.0] * 3


def test_data_that_mostly_cannot_be_scored_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="Expected at most 10%"):
        make_trainer("rl", tmp_path, trainer={"rewards": {"r": (by_target, 1.0)}})


def never(completions, **_):
    return [0.0 for _ in completions]


def test_a_gate_keeps_a_part_out_of_the_reward_and_in_the_log(tmp_path):
    rewards = {"correct": (never, 1.0), "even": (even_share, 1.0)}
    for gates, total in (({"even": "correct"}, 0), ({}, 1)):
        settings = {"rewards": rewards, "scoring": Scoring(gates, num_workers=0)}
        trainer = make_trainer("rl", tmp_path / str(total), trainer=settings)
        trainer.train()
        even = logged(trainer, "even")
        assert min(even) > 0.2
        assert logged(trainer, "reward") == pytest.approx([total * share for share in even])


def test_a_gate_that_names_no_reward_is_refused(tmp_path):
    settings = {"scoring": Scoring({"even": "correct"})}
    with pytest.raises(ConfigError, match="expected the names of two rewards; there are even"):
        make_trainer("rl", tmp_path, trainer=settings)


def by_step(completions, *, trainer_state, **_):
    return [float(trainer_state.global_step) for _ in completions]


def test_a_reward_may_ask_for_the_state_of_the_run(tmp_path):
    trainer = make_trainer("rl", tmp_path, trainer={"rewards": {"step": (by_step, 1.0)}})
    trainer.train()
    assert logged(trainer, "reward") == [0.0, 1.0, 2.0]
