"""The text that a completion commits itself to: after its thought, and in its place."""

import pytest

from posttrain.rewards.math import verify_math
from posttrain.rewards.text import completion_text, final_text


def answered(answer):
    return f"<think>some thought</think><answer>{answer}</answer>"


def test_the_final_text_is_the_last_answer_or_what_follows_the_last_thought():
    assert final_text("a") == ("a", False, "")
    assert final_text("<think>a</think> b") == (" b", False, "")
    assert final_text("a</think>b", prefilled_think=True) == ("b", False, "")
    assert final_text("<answer>a</answer> or <answer>b</answer>.") == ("b", True, "")
    assert final_text("a", prefilled_think=True) == ("", False, "<think> is not closed")
    assert final_text("<answer>a").problem == "<answer> is not closed, or not opened"


def test_the_text_of_messages_is_that_of_the_last_one():
    parts = [{"type": "text", "text": "a"}, {"type": "image"}, {"text": "b"}]
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": parts}]
    assert completion_text(messages) == "ab"
    assert completion_text([{"role": "assistant", "content": None}]) == ""
    assert completion_text([]) == ""


@pytest.mark.parametrize(
    ("completion", "score"),
    [
        (answered("18"), 1.0),
        (r"<think>t</think> \boxed{18}", 1.0),
        (r"\boxed{18}", 1.0),
        ("<answer>17</answer><answer>18</answer>", 1.0),
        ("<answer>18</answer><answer>17</answer>", 0.0),
        ("<answer>18", 0.0),
        ("18</answer>", 0.0),
        ("</answer>18<answer>", 0.0),
        (r"<answer>17</answer> \boxed{18}", 0.0),
        (r"<think>\boxed{18}", 0.0),
        (r"<think><answer>18</answer>", 0.0),
        (r"<think>\boxed{18}</think> no idea", 0.0),
        (r"<think>a</think><answer>18</answer><think>but", 0.0),
        (r"<think>a</think>\boxed{17}<think>b</think>\boxed{18}", 1.0),
        (r"\boxed{18", 0.0),
        (r"\boxed{18} then \boxed{1", 1.0),
        (r"\\boxed{18}", 1.0),
        ("18", 0.0),
        ("#### 18", 0.0),
        ("", 0.0),
    ],
)
def test_the_answer_stands_after_the_thought_and_in_its_place(completion, score):
    assert verify_math("18", completion).score == score


def test_a_prefilled_thought_must_be_closed_before_anything_counts():
    inside = r"so \boxed{18}"
    assert verify_math("18", inside).score == 1.0
    assert verify_math("18", inside, prefilled_think=True).score == 0.0
    assert verify_math("18", "so</think><answer>18</answer>", prefilled_think=True).score == 1.0
