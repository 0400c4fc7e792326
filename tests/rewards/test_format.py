"""The think/answer shape: the golden case, its variants, and time."""

import pytest

from posttrain.rewards.format import (
    has_think,
    is_think_answer,
    tag_count,
    tag_score,
    think_answer_format,
    think_format,
)
from tests.deadline import deadline

# Golden case r1_format_reward: text, strict, think tags only.
R1_FORMAT_REWARD = [
    ("<think>a</think><answer>b</answer>", 1.0, 1.0),
    ("<think>\na\n</think>\n<answer>\nb\n</answer>", 1.0, 1.0),
    ("<think>a</think> tail only", 0.0, 1.0),
    ("a</think><answer>b</answer>", 0.0, 0.0),
    ("<think>a<think>b</think><answer>c</answer>", 0.0, 0.0),
    ("<think>a</think><answer>b</answer> trailing", 0.0, 1.0),
    (" <think>a</think><answer>b</answer>", 1.0, 0.0),
    ("<think>a</think><answer>b</answer><answer>c</answer>", 0.0, 1.0),
]


@pytest.mark.parametrize(("text", "strict", "think_only"), R1_FORMAT_REWARD)
def test_format_rewards_match_the_golden_case(text, strict, think_only):
    assert think_answer_format([text]) == [strict]
    assert think_format([text]) == [think_only]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "42",
        "<think></think><answer>b</answer>",
        "<think>a</think><answer> \n</answer>",
        "<think>a</think>,<answer>b</answer>",
        "<think>a</think><answer>b</answer>\n.",
        "<answer>b</answer><think>a</think>",
        "<think>a<answer>b</think></answer>",
        "<think>a</think><answer>b",
        "<think>a</think><answer>b</answer></answer>",
        "<Think>a</Think><answer>b</answer>",
        "< think>a</think><answer>b</answer>",
    ],
)
def test_anything_but_the_exact_shape_is_refused(text):
    assert not is_think_answer(text)


def test_white_space_around_the_tags_is_free():
    assert is_think_answer("\n <think>a</think>\n\n\t<answer>b</answer>\u00a0\n")


def test_a_prefilled_think_tag_must_not_be_repeated():
    rest = "a</think><answer>b</answer>"
    assert is_think_answer(rest, prefilled_think=True)
    assert not is_think_answer("<think>" + rest, prefilled_think=True)
    assert not is_think_answer("</think><answer>b</answer>", prefilled_think=True)
    assert has_think(rest, prefilled_think=True)
    assert not has_think("<think>" + rest, prefilled_think=True)
    assert think_answer_format([rest, rest[1:]], prefilled_think=True) == [1.0, 0.0]


@pytest.mark.parametrize("reward", [think_answer_format, think_format, tag_count])
def test_chat_messages_are_read(reward):
    chat = [{"role": "assistant", "content": "<think>a</think><answer>b</answer>"}]
    assert reward(completions=[chat], prompts=["p"], completion_ids=[[1]]) == [1.0]


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("42", 0.0),
        ("<think>a", 0.25),
        ("<think>a</think> 42", 0.5),
        ("<think>a</think><answer>b", 0.75),
        ("so <think></think> 42 <answer></answer>.", 1.0),
        ("</think><answer>b</answer>", 0.75),
        ("<answer>b</answer><think>a</think>", 0.5),
        ("</answer><answer></think><think>", 0.25),
        ("</answer><think>a</think><answer>b", 0.75),
    ],
)
def test_each_tag_in_its_place_pays_a_quarter(text, score):
    assert tag_score(text) == score


@pytest.mark.parametrize("tag", ["<think>", "</think>", "<answer>", "</answer>"])
def test_a_tag_that_is_repeated_pays_nothing(tag):
    whole = "<think>a</think><answer>b</answer>"
    assert tag_score(whole) == 1.0
    assert tag_score(whole.replace(tag, tag * 2)) == 0.75
    assert tag_score(whole + tag * 50) <= 0.75


def test_the_tag_score_is_1_for_every_text_of_the_strict_shape():
    texts = [text for text, strict, _ in R1_FORMAT_REWARD if strict]
    assert len(texts) == 3
    assert tag_count(texts) == [1.0] * 3


def test_a_prefilled_think_tag_counts_unless_it_is_repeated():
    assert tag_score("a</think>b") == 0.25
    assert tag_score("a</think>b", prefilled_think=True) == 0.5
    assert tag_count(["a</think>b", "<think>a</think>b"], prefilled_think=True) == [0.5, 0.25]


def test_a_megabyte_is_checked_and_never_hangs():
    for unit in ["<think>", "<think></think>", "<", " ", "<think>a</think>"]:
        text = unit * (1_000_000 // len(unit))
        with deadline(30, unit):
            assert not is_think_answer(text), unit
            assert not is_think_answer(f"<think>a</think><answer>{text}"), unit
            assert tag_score(text) <= 0.5, unit


def test_the_lenient_check_agrees_with_trl():
    rewards = pytest.importorskip("trl.rewards")
    texts = [text for text, _, _ in R1_FORMAT_REWARD]
    texts += ["<think></think>", "<think>a", "x<think>a</think>", "<think>a</think></think>\nb"]
    chats = [[{"role": "assistant", "content": text}] for text in texts]
    assert think_format(texts) == rewards.think_format_reward(chats)
