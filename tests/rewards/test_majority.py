"""Votes: equal in mathematics is one answer, a completion without an answer has none."""

import pytest

from posttrain.rewards.majority import group_answers


@pytest.mark.parametrize(
    ("texts", "groups"),
    [
        ([r"\boxed{1/2}", "no idea", r"\boxed{0.5}", r"\boxed{2}"], [0, None, 0, 1]),
        ([r"\boxed{2x+1}", r"\boxed{1 + 2 x}", r"\boxed{x}"], [0, 0, 1]),  # by algebra
        (["<think>7</think><answer>18</answer>", r"\boxed{18.0}", "<answer>18"], [0, 0, None]),
        ([r"\boxed{5} or \boxed{5.0}", r"\boxed{5}", r"\boxed{5} \boxed{6}"], [0, 0, 1]),
        ([r"\boxed{)(}", r"\boxed{)(}", r"\boxed{3}", r"\boxed{}"], [0, 0, 1, None]),
        ([r"\boxed{" + "1" * 3000 + "}", r"\boxed{1}"], [None, 0]),
    ],
)
def test_equal_answers_are_one_group(texts, groups):
    assert group_answers(texts) == groups


def test_a_thought_that_the_prompt_opened_has_no_vote_until_it_is_closed():
    texts = [r"\boxed{3}", r"\boxed{3}</think>\boxed{4}"]
    assert group_answers(texts, ["so <think>\n"] * 2) == [None, 0]
    assert group_answers(texts, ["so"] * 2) == [0, 1]
