"""The think/answer shape: the golden case, its variants, and time."""

import time

import pytest

from posttrain.rewards.format import (
    has_think,
    is_think_answer,
    think_answer_format,
    think_format,
)

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


def test_chat_messages_are_read():
    chat = [{"role": "assistant", "content": "<think>a</think><answer>b</answer>"}]
    assert think_answer_format(completions=[chat], prompts=["p"], completion_ids=[[1]]) == [1.0]


@pytest.mark.parametrize("unit", ["<think>", "<think></think>", "<", " ", "<think>a</think>"])
def test_a_megabyte_is_checked_at_once(unit):
    text = unit * (1_000_000 // len(unit))
    start = time.process_time()
    assert not is_think_answer(text)
    assert not is_think_answer(f"<think>a</think><answer>{text}")
    assert time.process_time() - start < 0.2


def test_the_lenient_check_agrees_with_trl():
    rewards = pytest.importorskip("trl.rewards")
    texts = [text for text, _, _ in R1_FORMAT_REWARD]
    texts += ["<think></think>", "<think>a", "x<think>a</think>", "<think>a</think></think>\nb"]
    chats = [[{"role": "assistant", "content": text}] for text in texts]
    assert think_format(texts) == rewards.think_format_reward(chats)
