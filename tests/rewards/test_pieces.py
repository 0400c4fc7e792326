"""Rewards in worker processes: nothing they do reaches the run, and their values are the same."""

import os
import re
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from posttrain.errors import ConfigError
from posttrain.rewards import pieces, tally
from posttrain.rewards.by_name import load_reward
from posttrain.rewards.call import Scoring, score, start_scoring, with_messages
from posttrain.rewards.format import think_answer_format
from posttrain.rewards.length import kimi_length
from posttrain.rewards.math import math_reward
from posttrain.rewards.pieces import per_completion, portable
from posttrain.workers.pool import WorkerPool

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


def where(completions, **_columns):
    return [float(os.getpid()) for _ in completions]


def how_many(completions, **_columns):
    return [float(len(completions)) for _ in completions]


@per_completion
def length(completions, **_columns):
    return [float(len(text)) for text in completions]


def backtracks(completions, **_columns):
    """A regular expression that holds the interpreter's lock for ages: no thread could stop it."""
    return [float(bool(re.fullmatch(r"(a+)+b", text))) for text in completions]


@per_completion
def trips(completions, **_columns):
    """Raises, dies or hangs at the answers that say so."""
    for text in completions:
        if text == "raise":
            raise ValueError("as told")
        if text == "die":
            os._exit(3)
        if text == "hang":
            time.sleep(60)
    return [1.0 for _ in completions]


def odd(**_call):
    return ["high"]


async def awaited(completions, **_columns):
    return [float(len(text)) for text in completions]


def asks_for_the_run(completions, trainer_state):
    return [float(os.getpid()) if trainer_state is None else 0.0 for _ in completions]


def test_a_reward_runs_in_another_process():
    found = score_in_workers({"pid": (where, 1.0)}, ["x"]).totals[0]
    assert found != os.getpid()


@pytest.mark.parametrize(
    "reward", [lambda completions, **_: where(completions), asks_for_the_run],
    ids=["closure", "trainer_state"],
)  # fmt: skip
def test_what_cannot_be_sent_runs_here(reward):
    scores = score_in_workers({"pid": (reward, 1.0)}, ["x"], trainer_state=None)
    assert scores.totals == [float(os.getpid())]


def weighs(completions, *, model, **_columns):
    return where(completions) if model else []


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


def talks(text):
    print("a worker says", text, flush=True)


def test_what_a_worker_prints_is_seen_where_that_is_asked_for(capfd):
    for shows_output in (True, False):
        pool = WorkerPool("tests.rewards.test_pieces:talks", shows_output=shows_output)
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
    tally.take()
    score_in_workers(
        {"correct": (math_reward, 1.0)}, [GOOD, WRONG, "so 18"] * 20, answer=["18.0"] * 60
    )
    assert tally.take() == {"equal numbers": 20, "different numbers": 20, "no answer": 20}


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
    start = time.monotonic()
    scores = score_in_workers({"r": (backtracks, 1.0)}, ["a" * 60], timeout_seconds=0.5)
    assert time.monotonic() - start < 8
    assert scores.timeouts == 1
    assert "0.5 seconds" in scores.failures["r"]


def test_a_reward_that_hangs_on_everything_is_not_asked_again_for_each_answer():
    start = time.monotonic()
    scores = score_in_workers({"r": (trips, 1.0)}, ["hang"] * 16, timeout_seconds=0.3)
    assert time.monotonic() - start < 10
    assert scores.timeouts == pieces.MAX_TIMEOUTS_PER_PIECE
    assert scores.none == 16


def test_a_failure_names_the_line_of_the_reward():
    scores = score_in_workers({"r": (trips, 1.0)}, ["raise"])
    assert scores.failures["r"].startswith("ValueError: as told")
    assert "test_pieces.py, line" in scores.failures["r"]


def test_a_result_of_the_wrong_kind_in_a_worker_is_an_error_that_names_the_reward():
    with pytest.raises(ConfigError, match="reward 'odd', value 0: expected a number"):
        score_in_workers({"odd": (odd, 1.0)}, ["x"])


def test_scoring_goes_on_while_the_caller_works():
    """The wait is what is left of the reward's second when half of it has passed elsewhere."""
    wait = start_scoring(
        {"slow": (sleeps_a_second, 1.0)}, ["x"], prompts=["p"], completion_ids=[[0]], columns={},
        scoring=Scoring(num_workers=1),
    )  # fmt: skip
    time.sleep(3)
    start = time.monotonic()
    assert wait().totals == [1.0]
    assert time.monotonic() - start < 0.9


def sleeps_a_second(completions, **_columns):
    time.sleep(1)
    return [1.0 for _ in completions]


MY_REWARDS = """
from beside import BONUS

def short(completions, *, level, prefilled_think=False, **_columns):
    return [BONUS / len(c) + n + prefilled_think for c, n in zip(completions, level, strict=True)]
"""


@pytest.fixture
def my_rewards(tmp_path):
    (tmp_path / "beside.py").write_text("BONUS = 8\n")
    path = tmp_path / "math.py"  # the name of a module that is loaded already
    path.write_text(MY_REWARDS)
    return path


def test_a_function_in_a_users_file_is_a_reward_in_workers_too(my_rewards):
    reward = load_reward(f"{my_rewards}:short", {}, prefilled_think=True, unknown_option=1)
    scores = score_in_workers({"short": (reward, 1.0)}, ["xxxx"], level=[10])
    assert scores.totals == [13.0]
    assert portable(reward) is not None
    assert Path(sys.modules["math"].__spec__.origin or "built-in") != my_rewards


def test_a_name_is_looked_up_in_the_table():
    assert load_reward("math", {"math": math_reward}) is math_reward


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("maths", "expected math or FILE.py:FUNCTION, found 'maths'. Did you mean 'math'"),
        ("nowhere.py:short", "found none at .*nowhere.py"),
        ("{file}:shot", "expected a function 'shot' in .*; it has short"),
        ("{broken}:f", r"cannot be imported \(SyntaxError"),
    ],
)
def test_a_reward_that_is_not_there_is_an_error_that_says_what_is(name, message, my_rewards):
    broken = my_rewards.with_name("broken.py")
    broken.write_text("def f(:\n")
    with pytest.raises(ConfigError, match=message):
        load_reward(name.format(file=my_rewards, broken=broken), {"math": math_reward})


def test_wrapped_rewards_can_be_sent():
    assert portable(with_messages(think_answer_format)) is not None
    assert portable(partial(kimi_length, accuracy=math_reward)) is not None
