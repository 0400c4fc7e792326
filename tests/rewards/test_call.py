"""Rewards are checked before the run, and cannot end it."""

import logging
import math
import sys
import threading

import pytest

from posttrain.errors import ConfigError
from posttrain.rewards.call import Scoring, check_rewards, score, with_messages
from posttrain.rewards.format import think_answer_format
from posttrain.rewards.math import math_reward
from tests.deadline import deadline

GOOD = "<think>9 + 9</think><answer>18</answer>"
UNSHAPED = r"\boxed{18}"
WRONG = "<think>9 + 8</think><answer>17</answer>"


def score_texts(
    rewards, completions, *, timeout_seconds=5.0, num_workers=0, gates=None, prompts=None, **columns
):
    return score(
        rewards,
        completions,
        prompts=prompts or ["p"] * len(completions),
        completion_ids=[list(range(n + 1)) for n in range(len(completions))],
        columns=columns,
        scoring=Scoring(gates or {}, timeout_seconds, num_workers),
    )


def numbers_reward(values):
    """A reward that returns these values whatever the answers are."""
    return lambda **_call: values


def test_totals_are_weighted_sums_of_the_parts():
    """1 * 1 + 0.1 * 1, 1 * 1 + 0.1 * 0, 1 * 0 + 0.1 * 1."""
    rewards = {"correct": (math_reward, 1.0), "format": (think_answer_format, 0.1)}
    scores = score_texts(rewards, [GOOD, UNSHAPED, WRONG], answer=["18"] * 3)
    assert scores.totals == pytest.approx([1.1, 1.0, 0.1])
    assert scores.parts == {"correct": [1.0, 1.0, 0.0], "format": [1.0, 0.0, 1.0]}
    assert (scores.errors, scores.timeouts, scores.none, scores.failures) == (0, 0, 0, {})
    assert scores.means() == pytest.approx({"correct": 2 / 3, "format": 2 / 3})


def test_an_answer_without_a_score_has_no_total_and_stays_out_of_the_mean():
    rewards = {"correct": (math_reward, 1.0), "format": (think_answer_format, 0.1)}
    scores = score_texts(rewards, [GOOD, GOOD, GOOD], answer=["18", "", "19"])
    assert math.isnan(scores.totals[1])
    assert scores.totals[0::2] == pytest.approx([1.1, 0.1])
    assert scores.parts["correct"] == [1.0, None, 0.0]
    assert scores.none == 1
    assert scores.sums() == {"correct": (1.0, 2), "format": (3.0, 3)}


def test_a_part_without_weight_is_kept_and_does_not_touch_the_total():
    rewards = {"a": (numbers_reward([1, 2]), 1.0), "watched": (numbers_reward([None, 7]), 0.0)}
    scores = score_texts(rewards, ["x", "y"])
    assert scores.totals == [1.0, 2.0]
    assert scores.parts["watched"] == [None, 7.0]


def test_a_reward_that_scores_nothing_has_no_mean():
    scores = score_texts({"a": (numbers_reward([None, float("nan")]), 1.0)}, ["x", "y"])
    assert math.isnan(scores.means()["a"])
    assert scores.none == 2


def test_values_that_are_not_finite_count_as_unscored():
    scores = score_texts({"a": (numbers_reward([float("inf"), 1]), 1.0)}, ["x", "y"])
    assert scores.parts["a"] == [None, 1.0]


def test_numpy_and_torch_results_are_numbers():
    numpy, torch = pytest.importorskip("numpy"), pytest.importorskip("torch")
    for values in (numpy.array([0.5, 1]), torch.tensor([0.5, 1]), [numpy.float32(0.5), True]):
        assert score_texts({"a": (numbers_reward(values), 1.0)}, ["x", "y"]).totals == [0.5, 1.0]


def test_a_gated_part_counts_only_where_its_gate_is_open():
    """Right and short: 1 + 0.5 * 0.8. Wrong and short: no bonus. Wrong and long: no penalty."""
    rewards = {
        "correct": (numbers_reward([1, 0, 0, None]), 1.0),
        "short": (numbers_reward([0.8, 0.8, -0.8, 0.8]), 0.5),
    }
    scores = score_texts(rewards, ["w", "x", "y", "z"], gates={"short": "correct"})
    assert scores.totals[:3] == pytest.approx([1.4, 0.0, 0.0])
    assert math.isnan(scores.totals[3])
    assert scores.parts["short"] == [0.8, 0.8, -0.8, 0.8]


def test_a_closed_gate_makes_up_for_a_part_without_a_score():
    rewards = {"correct": (numbers_reward([0, 1]), 1.0), "short": (numbers_reward([None] * 2), 1.0)}
    scores = score_texts(rewards, ["x", "y"], gates={"short": "correct"})
    assert scores.totals[0] == 0.0
    assert math.isnan(scores.totals[1])


def test_a_gate_without_weight_still_gates():
    rewards = {"correct": (numbers_reward([0, 1]), 0.0), "short": (numbers_reward([1, 1]), 1.0)}
    assert score_texts(rewards, ["x", "y"], gates={"short": "correct"}).totals == [0.0, 1.0]


def raises(completions, **_columns):
    return [1 / 0 for _ in completions]


def leaves(**_call):
    sys.exit(3)


was_judged = threading.Event()  # else a loop would take processor time from all later tests


def loops(**_call):
    while not was_judged.is_set():
        pass


def sleeps(completions, **_columns):
    was_judged.wait(60)
    return [1.0 for _ in completions]


@pytest.mark.parametrize(
    ("reward", "kind"), [(raises, "ZeroDivisionError"), (leaves, "SystemExit")]
)
def test_a_reward_that_raises_costs_its_answers_and_not_the_run(reward, kind):
    rewards = {"broken": (reward, 1.0), "format": (think_answer_format, 0.1)}
    scores = score_texts(rewards, [GOOD, WRONG])
    assert (scores.errors, scores.timeouts, scores.none) == (1, 0, 2)
    assert scores.parts == {"broken": [None, None], "format": [1.0, 1.0]}
    assert scores.failures["broken"].startswith(kind)
    assert "test_call.py, line" in scores.failures["broken"]


@pytest.mark.parametrize("reward", [loops, sleeps])
def test_a_reward_that_hangs_is_left_behind_at_its_deadline(reward):
    rewards = {"stuck": (reward, 1.0), "format": (think_answer_format, 0.1)}
    was_judged.clear()
    with deadline(30):
        scores = score_texts(rewards, [GOOD, WRONG], timeout_seconds=0.1)
    was_judged.set()
    assert (scores.errors, scores.timeouts, scores.none) == (0, 1, 2)
    assert scores.parts["format"] == [1.0, 1.0]
    assert "0.1 seconds" in scores.failures["stuck"]


def test_a_rewards_own_timeout_error_is_an_error():
    def request(**_call):
        raise TimeoutError("no reply")

    scores = score_texts({"judge": (request, 1.0)}, ["x"])
    assert (scores.errors, scores.timeouts) == (1, 0)


def test_a_failure_is_reported_once_and_counted_always(caplog):
    words = iter(("first", "second", "third"))

    def fails_each_time_in_other_words(**_call):
        raise RuntimeError(f"at {next(words)}")

    rewards = {"reported once": (fails_each_time_in_other_words, 1.0)}
    with caplog.at_level(logging.WARNING):
        counts = [score_texts(rewards, ["x"]).errors for _ in range(3)]
    messages = [record.getMessage() for record in caplog.records]
    assert counts == [1, 1, 1]
    assert len(messages) == 1
    assert "'reported once' failed: RuntimeError: at" in messages[0]


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ([1.0], "expected 2 values, one per completion, found 1"),
        ([1.0] * 3, "expected 2 values, one per completion, found 3"),
        ([1.0, "1.0"], "value 1: expected a number or None, found '1.0'"),
        ([1.0, [1.0]], "value 1: expected a number"),
        (None, "expected a list of 2 numbers or None, found NoneType"),
        (1.0, "expected a list of 2 numbers or None, found float"),
    ],
)
def test_a_result_of_the_wrong_kind_is_an_error_that_names_the_reward(result, message):
    with pytest.raises(ConfigError, match=f"reward 'odd'.*{message}"):
        score_texts({"odd": (numbers_reward(result), 1.0)}, ["x", "y"])


def test_columns_of_another_length_are_refused():
    with pytest.raises(ValueError, match="expected 2 values in 'answer', found 3"):
        score_texts({"correct": (math_reward, 1.0)}, ["x", "y"], answer=["1"] * 3)


def test_a_reward_gets_the_arguments_that_it_names():
    def named(completions, level, trainer_state):
        return [len(c) + n + trainer_state for c, n in zip(completions, level, strict=True)]

    check_rewards({"named": (named, 1.0)}, ["level", "unused"])
    scores = score_texts({"named": (named, 1.0)}, ["x"], level=[10], unused=[0], trainer_state=100)
    assert scores.totals == [111.0]


def test_a_coroutine_function_is_awaited():
    async def judge(completions, **_columns):
        return [float(len(c)) for c in completions]

    assert score_texts({"judge": (judge, 1.0)}, ["a", "bb"]).totals == [1.0, 2.0]


def test_trl_rewards_run_in_ours_on_chats_and_on_plain_text():
    trl_rewards = pytest.importorskip("trl.rewards")
    format_reward = trl_rewards.think_format_reward
    overlong = trl_rewards.get_soft_overlong_punishment(max_completion_len=2, soft_punish_cache=1)
    chats = [[{"role": "assistant", "content": text}] for text in (GOOD, UNSHAPED)]
    rewards = {"format": (format_reward, 1.0), "short": (overlong, 1.0)}
    check_rewards(rewards, ["answer"])
    on_chats = score_texts(rewards, chats, answer=["18", "18"])
    wrapped = {**rewards, "format": (with_messages(format_reward), 1.0)}
    on_texts = score_texts(wrapped, [GOOD, UNSHAPED], answer=["18", "18"])
    assert on_chats.failures == {}
    assert on_chats.parts == {"format": [1.0, 0.0], "short": [0.0, -1.0]}
    assert on_texts.parts == on_chats.parts
