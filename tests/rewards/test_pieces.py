"""Rewards in worker processes: nothing they do reaches the run, and their values are the same."""

import os
from functools import partial

import pytest

from posttrain.errors import ConfigError
from posttrain.rewards import pieces
from posttrain.rewards.call import Scoring, score, start_scoring, with_messages
from posttrain.rewards.format import think_answer_format
from posttrain.rewards.length import kimi_length
from posttrain.rewards.math import math_reward
from posttrain.rewards.pieces import portable, take_verdicts
from posttrain.workers.pool import WorkerPool
from tests.deadline import deadline
from tests.processes import wait_until
from tests.rewards.functions import (
    asks_for_the_run,
    awaited,
    backtracks,
    how_many,
    length,
    makes_a_file,
    odd,
    trips,
    weighs,
    where,
)

GOOD = "<think>9 + 9</think><answer>18</answer>"
WRONG = "<think>9 + 8</think><answer>17</answer>"


def score_in_workers(rewards, completions, *, prompts=None, timeout_seconds=10.0, **columns):
    return score(
        rewards,
        completions,
        prompts=prompts or ["p"] * len(completions),
        completion_ids=[[0] * len(text) for text in completions],
        columns=columns,
        scoring=Scoring(timeout_seconds=timeout_seconds, num_workers=2),
    )


def test_a_reward_runs_in_another_process():
    found = score_in_workers({"pid": (where, 1.0)}, ["x"]).totals[0]
    assert found != os.getpid()


def test_what_cannot_be_sent_runs_here():
    """A closure, and what asks for the trainer's state."""
    for reward in (lambda completions, **_: where(completions), asks_for_the_run):
        scores = score_in_workers({"pid": (reward, 1.0)}, ["x"], trainer_state=None)
        assert scores.totals == [float(os.getpid())]


@pytest.mark.parametrize(("num_bytes", "stays"), [(pieces.MAX_PICKLE_BYTES, True), (1000, False)])
def test_a_reward_that_carries_a_model_stays_in_this_process(num_bytes, stays):
    reward = partial(weighs, model=b"x" * num_bytes)
    scores = score_in_workers({"pid": (reward, 1.0)}, ["x"])
    assert (scores.totals == [float(os.getpid())]) == stays


class Remembers:
    def __init__(self):
        self.seen = []

    def __call__(self, completions, **_columns):
        self.seen += completions
        return [0.0 for _ in completions]


def test_what_a_worker_prints_is_seen_where_that_is_asked_for(capfd):
    for shows_output in (True, False):
        pool = WorkerPool("tests.rewards.functions:talks", shows_output=shows_output)
        pool.call("hello", timeout_seconds=20)
        pool.close()
        assert ("a worker says hello" in capfd.readouterr().out) == shows_output


def test_an_object_keeps_its_state():
    reward = Remembers()
    score_in_workers({"r": (reward, 1.0)}, ["x", "y"])
    assert reward.seen == ["x", "y"]


def test_workers_give_what_threads_give():
    rewards = {
        "correct": (partial(math_reward, allow_last_number=True), 1.0),
        "format": (think_answer_format, 0.1),
        "length": (kimi_length, 0.5),
        "awaited": (awaited, 0.01),
    }
    texts = [GOOD, WRONG, "so 18", "", GOOD * 2, "19"] * 5
    call = {
        "prompts": ["p"] * 15 + ["q"] * 15,
        "completion_ids": [[0] * len(text) for text in texts],
        "columns": {"answer": ["18"] * 29 + [""]},
    }
    here = score(rewards, texts, **call, scoring=Scoring(num_workers=0))
    there = score(rewards, texts, **call, scoring=Scoring(num_workers=2))
    assert str(there) == str(here)  # str: NaN is not equal to itself
    assert there.none == 1


def test_kinds_of_verdicts_are_counted_across_processes():
    take_verdicts()
    score_in_workers(
        {"correct": (math_reward, 1.0)}, [GOOD, WRONG, "so 18"] * 20, answer=["18.0"] * 60
    )
    assert take_verdicts() == {"equal numbers": 20, "different numbers": 20, "no answer": 20}


def test_a_reward_that_may_compare_gets_whole_groups_and_no_more():
    prompts = ["p"] * 3 + ["q"] * 2 + ["p"]
    scores = score_in_workers({"n": (how_many, 1.0)}, ["x"] * 6, prompts=prompts)
    assert scores.totals == [3.0, 3.0, 3.0, 2.0, 2.0, 1.0]


def test_a_marked_reward_gets_pieces_and_its_values_come_back_in_order():
    texts = ["x" * n for n in range(3 * pieces.PIECE_COMPLETIONS + 1)]
    scores = score_in_workers({"length": (length, 1.0)}, texts)
    assert scores.totals == [float(n) for n in range(len(texts))]


@pytest.mark.parametrize("fate", ["raise", "die", "hang"])
def test_an_answer_that_brings_its_reward_down_costs_itself_alone(fate):
    scores = score_in_workers({"r": (trips, 1.0)}, ["x", fate, "y"], timeout_seconds=1.0)
    assert scores.parts["r"] == [1.0, None, 1.0]
    assert (scores.errors, scores.timeouts) == ((0, 1) if fate == "hang" else (1, 0))


def test_a_runaway_regular_expression_is_ended_at_its_deadline():
    with deadline(60):
        scores = score_in_workers({"r": (backtracks, 1.0)}, ["a" * 60], timeout_seconds=0.5)
    assert scores.timeouts == 1
    assert "0.5 seconds" in scores.failures["r"]


def test_a_reward_that_hangs_on_everything_is_not_asked_again_for_each_answer():
    scores = score_in_workers({"r": (trips, 1.0)}, ["hang"] * 16, timeout_seconds=0.3)
    assert scores.timeouts == pieces.MAX_TIMEOUTS_PER_PIECE
    assert scores.none == 16


def test_a_failure_names_the_line_of_the_reward():
    scores = score_in_workers({"r": (trips, 1.0)}, ["raise"])
    assert scores.failures["r"].startswith("ValueError: as told")
    assert "functions.py, line" in scores.failures["r"]


def test_a_result_of_the_wrong_kind_in_a_worker_is_an_error_that_names_the_reward():
    with pytest.raises(ConfigError, match="reward 'odd', value 0: expected a number"):
        score_in_workers({"odd": (odd, 1.0)}, ["x"])


def test_scoring_goes_on_while_the_caller_works(tmp_path):
    """The reward is done before anybody waits for it."""
    done = tmp_path / "done"
    call = {"prompts": ["p"], "completion_ids": [[0]], "columns": {"path": [str(done)]}}
    scoring = Scoring(num_workers=1)
    wait = start_scoring({"slow": (makes_a_file, 1.0)}, ["x"], **call, scoring=scoring)
    assert wait_until(done.exists, seconds=60)
    assert wait().totals == [1.0]


def test_wrapped_rewards_can_be_sent():
    assert portable(with_messages(think_answer_format)) is not None
    assert portable(partial(kimi_length, accuracy=math_reward)) is not None
