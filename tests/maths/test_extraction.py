"""Final answers in a text: boxes, and what the lenient modes take."""

import pytest

from posttrain.maths.normalise import boxed, extract_answers, last_boxes
from posttrain.rewards.math import verify_math


def answered(answer):
    return f"<think>some thought</think><answer>{answer}</answer>"


@pytest.mark.parametrize(
    ("options", "completion", "score"),
    [
        ({"allow_hashes": True}, "9 + 9 = 18\n#### 18\nQuestion: 3", 1.0),
        ({"allow_hashes": True}, "#### 18 #### 17", 0.0),
        ({"allow_hashes": True}, r"\boxed{17} #### 18", 0.0),
        ({"allow_hashes": True}, "it is 18", 0.0),
        ({"allow_last_number": True}, "9 + 9 makes $18.", 1.0),
        ({"allow_last_number": True}, "it is 18 for 3 people", 0.0),
        ({"allow_last_number": True}, "1,000 less 982 is 21-3 = 18", 1.0),
        ({"allow_last_number": True}, answered("that is 18 apples"), 1.0),
        ({"allow_last_number": True}, r"\boxed{17} not 18", 0.0),
        ({"allow_last_number": True}, "no number", 0.0),
        ({"allow_last_number": True}, "<think>18", 0.0),
    ],
)
def test_lenient_modes_look_where_nothing_is_boxed(options, completion, score):
    assert verify_math("18", completion, **options).score == score


def test_the_last_number_keeps_its_sign_but_takes_no_minus_from_a_difference():
    options = {"allow_last_number": True}
    assert verify_math("-3", "x is -3", **options).score == 1.0
    assert verify_math("3", "5-3", **options).score == 1.0


@pytest.mark.parametrize(
    ("text", "bodies"),
    [
        (r"\boxed{a}\boxed{b}", ["a", "b"]),
        (r"\boxed{\frac{1}{2}}", [r"\frac{1}{2}"]),
        (r"\boxed{\{1, 2\}}", [r"\{1, 2\}"]),
        (r"\boxed{a \boxed{b} c}", [r"a \boxed{b} c"]),
        (r"\boxed{a \boxed{b}", ["b"]),
        (r"}}} \boxed {a}", ["a"]),
        (r"\fbox{a} {b}", ["a"]),
        (r"\boxed a", []),
    ],
)
def test_boxes_are_found_by_counting_braces(text, bodies):
    assert boxed(text) == bodies


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"first \boxed{3} apples, then \boxed{18}", "18"),
        (r"\boxed{1} and \boxed{2}", "1, 2"),
        (r"$\boxed{1}$, $\boxed{2}$ \text{ or } $\boxed{3}$", "1, 2, 3"),
        (r"\boxed{18} = \boxed{18}", "18"),
        (r"\boxed{1}\quad\boxed{1}", "1"),
        ("none", ""),
    ],
)
def test_boxes_that_stand_together_are_one_answer(text, answer):
    assert last_boxes(text) == answer


def test_only_the_end_of_a_runaway_text_is_searched():
    far = r"\boxed{18}" + " " * 30_000
    assert extract_answers(far).answers == []
    assert extract_answers(" " * 30_000 + r"\boxed{18}").answers == ["18"]
