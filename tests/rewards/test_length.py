"""Length rewards against their golden cases, and how they group and count."""

from functools import partial
from types import SimpleNamespace

import pytest

from posttrain.errors import ConfigError
from posttrain.rewards.call import check_rewards, score
from posttrain.rewards.length import (
    cosine_length,
    cosine_length_reward,
    kimi_length,
    kimi_length_reward,
    kimi_length_warmup,
    kimi_length_with_warmup,
    missing_eos,
    soft_overlong_penalty,
    soft_overlong_reward,
)
from posttrain.rewards.math import math_reward

# Golden case dapo_soft_overlong_penalty: L_max 100, L_cache 20.
DAPO_SOFT_OVERLONG = [
    (10, 0.0),
    (80, 0.0),
    (81, -0.05),
    (90, -0.5),
    (100, -1.0),
    (101, -1.0),
    (150, -1.0),
]

# Golden case kimi_length_reward: lengths, correct, reward.
KIMI_LENGTH_REWARD = [
    ([100, 200, 300, 400], [True, False, True, False], [0.5, 0.0, -0.16666666666666663, -0.5]),
    ([50, 50, 50], [True, False, True], [0.0, 0.0, 0.0]),
    ([10, 1000, 505], [False, False, True], [0.0, -0.5, 0.0]),
]

# Golden case kimi_length_warmup: step, total of reward 1 and length reward -0.25; t0 3, weight 0.5.
KIMI_LENGTH_WARMUP = [(0, 1.0), (1, 1.0), (2, 1.0), (3, 0.875), (4, 0.875), (5, 0.875)]


@pytest.mark.parametrize(("num_tokens", "penalty"), DAPO_SOFT_OVERLONG)
def test_soft_overlong_penalty_matches_the_golden_case(num_tokens, penalty):
    found = soft_overlong_penalty(num_tokens, max_tokens=100, cache_tokens=20)
    assert found == pytest.approx(penalty, abs=1e-12)


@pytest.mark.parametrize("cache_tokens", [0, -1, 101])
def test_a_slope_without_width_is_refused(cache_tokens):
    with pytest.raises(ValueError, match="cache_tokens"):
        soft_overlong_penalty(10, max_tokens=100, cache_tokens=cache_tokens)


def test_the_overlong_reward_counts_tokens_not_characters():
    reward = partial(soft_overlong_reward, max_tokens=100, cache_tokens=20)
    assert reward(["x" * 500, "x"], completion_ids=[[7] * 80, [7] * 90]) == [0.0, -0.5]


@pytest.mark.parametrize(("num_tokens", "correct", "reward"), KIMI_LENGTH_REWARD)
def test_kimi_length_reward_matches_the_golden_case(num_tokens, correct, reward):
    assert kimi_length_reward(num_tokens, correct) == pytest.approx(reward, abs=1e-12)


@pytest.mark.parametrize(("step", "total"), KIMI_LENGTH_WARMUP)
def test_kimi_length_warmup_matches_the_golden_case(step, total):
    assert 1.0 + kimi_length_warmup(step, start_step=3, weight=0.5) * -0.25 == total


def kimi_call(prompts, lengths, answers, golds, **options):
    return kimi_length(
        [rf"\boxed{{{answer}}}" for answer in answers],
        prompts=prompts,
        completion_ids=[[7] * length for length in lengths],
        answer=golds,
        **options,
    )


def test_kimi_length_compares_only_answers_to_one_prompt():
    """The golden case's first and third group in one call give each group's own numbers."""
    found = kimi_call(
        ["a"] * 4 + ["b"] * 3,
        [100, 200, 300, 400, 10, 1000, 505],
        [1, 0, 1, 0, 0, 0, 2],
        ["1"] * 4 + ["2"] * 3,
    )
    expected = KIMI_LENGTH_REWARD[0][2] + KIMI_LENGTH_REWARD[2][2]
    assert found == pytest.approx(expected, abs=1e-12)


def test_kimi_length_has_no_score_where_the_gold_cannot_be_read():
    assert kimi_call(["a", "a", "b", "b"], [1, 2, 1, 2], [1] * 4, ["", "", "1", "1"]) == [
        None,
        None,
        0.5,
        -0.5,
    ]


def test_kimi_length_takes_the_accuracy_reward_with_its_options():
    prefilled = partial(math_reward, prefilled_think=True)
    assert kimi_call(["a"] * 2, [1, 2], [1, 1], ["1", "1"]) == [0.5, -0.5]
    assert kimi_call(["a"] * 2, [1, 2], [1, 1], ["1", "1"], accuracy=prefilled) == [0.0, -0.5]


def half_right(completions, **_columns):
    return [0.5 for _ in completions]


def test_an_answer_that_is_half_right_is_not_correct():
    assert kimi_call(["a"] * 2, [1, 2], [1, 1], ["1", "1"], accuracy=half_right) == [0.0, -0.5]


def listed(completions, *, prompts, choices):
    """Needs more than an answer, and takes nothing else."""
    rows = zip(completions, prompts, choices, strict=True)
    return [float(prompt + choice in text) for text, prompt, choice in rows]


@pytest.mark.parametrize(
    ("reward", "values"),
    [
        (partial(kimi_length, accuracy=listed), [0.5, -0.5]),
        (partial(kimi_length_with_warmup, accuracy=listed, start_step=0), [0.5, -0.5]),
        (partial(cosine_length, accuracy=listed, max_tokens=2), [0.75, -0.5]),
    ],
)
def test_the_accuracy_gets_the_columns_it_names_and_they_are_asked_for_before(reward, values):
    """The first is right: shorter, and half-way to the limit; the second is wrong, and at it."""
    with pytest.raises(ConfigError, match=r"needs 'choices'.*no such column"):
        check_rewards({"length": (reward, 1.0)}, ["answer"])
    check_rewards({"length": (reward, 1.0)}, ["answer", "choices"])
    columns = {"choices": ["b", "c"], "trainer_state": SimpleNamespace(global_step=0)}
    call = {"prompts": ["a"] * 2, "completion_ids": [[7], [7, 7]]}
    columns["answer"] = ["", ""]
    found = score({"length": (reward, 1.0)}, ["ab", "ab"], **call, columns=columns)
    assert found.totals == values


def warmed_up_call(step, **options):
    return kimi_length_with_warmup(
        [r"\boxed{1}"] * 2,
        prompts=["a"] * 2,
        completion_ids=[[7], [7, 7]],
        answer=["1"] * 2,
        trainer_state=SimpleNamespace(global_step=step),
        start_step=3,
        **options,
    )


def test_kimi_length_is_0_before_its_first_step_and_whole_from_then_on():
    assert [warmed_up_call(step) for step in (0, 2)] == [[0.0, 0.0]] * 2
    assert [warmed_up_call(step) for step in (3, 4)] == [[0.5, -0.5]] * 2
    assert warmed_up_call(3, accuracy=half_right) == [0.0, -0.5]


def test_the_first_step_of_kimi_length_has_to_be_bound_and_the_run_gives_the_rest():
    reward = partial(kimi_length_with_warmup, start_step=3)
    check_rewards({"short": (reward, 0.5)}, ["answer"])
    with pytest.raises(ConfigError, match="start_step"):
        check_rewards({"short": (kimi_length_with_warmup, 0.5)}, ["answer"])
    scores = score(
        {"short": (reward, 0.5)},
        [r"\boxed{1}"] * 2,
        prompts=["a"] * 2,
        completion_ids=[[7], [7, 7]],
        columns={"answer": ["1"] * 2, "trainer_state": SimpleNamespace(global_step=3)},
    )
    assert scores.totals == [0.25, -0.25]


# Half a cosine from the first value of a pair to the second: at 1/3 a quarter of the way, at 1/2
# half, at 2/3 three quarters.
COSINE_LENGTH = [
    (0, 1.0, -1.0),
    (100, 0.875, -0.875),
    (150, 0.75, -0.75),
    (200, 0.625, -0.625),
    (300, 0.5, -0.5),
    (450, 0.5, -0.5),
    (600, 0.5, -0.5),
]


@pytest.mark.parametrize(("num_tokens", "if_correct", "if_wrong"), COSINE_LENGTH)
def test_the_cosine_reward_falls_when_right_and_rises_when_wrong(num_tokens, if_correct, if_wrong):
    assert cosine_length_reward(num_tokens, True, max_tokens=300) == pytest.approx(if_correct)
    assert cosine_length_reward(num_tokens, False, max_tokens=300) == pytest.approx(if_wrong)


def test_the_cosine_reward_takes_the_papers_values():
    """2 to 1 if correct, -10 to 0 if wrong; half way: 1.5 and -5."""
    values = {"max_tokens": 100, "if_correct": (2.0, 1.0), "if_wrong": (-10.0, 0.0)}
    found = [cosine_length_reward(n, ok, **values) for ok in (True, False) for n in (0, 50, 100)]
    assert found == pytest.approx([2.0, 1.5, 1.0, -10.0, -5.0, 0.0])


@pytest.mark.parametrize("max_tokens", [0, -1])
def test_a_cosine_without_length_is_refused(max_tokens):
    with pytest.raises(ValueError, match="max_tokens"):
        cosine_length_reward(1, True, max_tokens=max_tokens)


def test_the_cosine_reward_agrees_with_trls():
    rewards = pytest.importorskip("trl.rewards")
    texts, lengths = [r"\boxed{1}", r"\boxed{2}"] * 3, [0, 10, 33, 60, 99, 150]
    call = {"completion_ids": [[7] * length for length in lengths]}
    theirs = rewards.get_cosine_scaled_reward(max_len=100)(
        [[{"role": "assistant", "content": text}] for text in texts], solution=["$1$"] * 6, **call
    )
    ours = cosine_length(texts, answer=["1"] * 6, max_tokens=100, **call)
    assert ours == pytest.approx(theirs)


def test_the_cosine_reward_counts_tokens_and_has_no_score_for_an_unreadable_gold():
    found = cosine_length(
        [r"\boxed{1}" + " " * 90, r"\boxed{2}", r"\boxed{1}"],
        completion_ids=[[7] * 50, [7] * 100, [7]],
        answer=["1", "1", ""],
        max_tokens=100,
    )
    assert found == [pytest.approx(0.75), -0.5, None]


def test_the_cosine_reward_takes_the_accuracy_reward_with_its_options():
    prefilled = partial(math_reward, prefilled_think=True)
    call = {"completion_ids": [[]], "answer": ["1"], "max_tokens": 9}
    assert cosine_length([r"\boxed{1}"], **call) == [1.0]
    assert cosine_length([r"\boxed{1}"], accuracy=prefilled, **call) == [-1.0]


def test_only_completions_without_a_stop_token_at_their_end_are_penalised():
    """(5, 1) and (2,) end; (1, 5) has the token in its middle; an empty completion has none."""
    assert missing_eos([[5, 1], [2], [1, 5], []], stop_ids={1, 2}) == [0, 0, -1, -1]


def test_the_penalty_for_truncation_ignores_the_other_columns_of_a_call():
    assert missing_eos(completion_ids=[[7]], stop_ids=(1,), prompts=["x"], answer=["y"]) == [-1]
