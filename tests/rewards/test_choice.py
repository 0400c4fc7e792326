"""Exact match and multiple choice: what counts as the same, and what is no answer."""

from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.rewards.checks import check_rewards, find_unscorable
from posttrain.rewards.choice import (
    MAX_ANSWER_CHARS,
    choice_match,
    choice_reward,
    exact_match,
    exact_match_reward,
    read_choice,
)
from tests.cases import read_cases
from tests.deadline import deadline

CHOICES = ["41", "42 apples", "none of these", "Paris"]


def answers(kind):
    return [case["answer"] for case in read_cases(__file__, "choice", kind=kind)]


def test_an_answer_that_reads_the_same_matches():
    for case in read_cases(__file__, "choice", kind="the same text"):
        gold, answer = case["gold"], case["answer"]
        assert exact_match(gold, f"<think>a</think><answer>{answer}</answer>") == 1.0, case
        assert exact_match(gold, rf"So it is \boxed{{{answer}}}.") == 1.0, case


def test_an_answer_that_differs_in_one_character_does_not():
    for case in read_cases(__file__, "choice", kind="another text"):
        assert exact_match(case["gold"], f"<answer>{case['answer']}</answer>") == 0.0, case


def test_what_is_longer_than_the_limit_is_no_answer_and_no_gold():
    limit = "x" * MAX_ANSWER_CHARS
    assert exact_match(limit, f"<answer>{limit}</answer>") == 1.0
    assert exact_match("x", f"<answer>x{' ' * MAX_ANSWER_CHARS}</answer>") == 0.0
    assert exact_match(limit + "x", f"<answer>{limit}x</answer>") is None


def test_an_answer_counts_only_where_it_is_given():
    assert exact_match("Paris", "Paris") == 0.0
    assert exact_match("Paris", "<think><answer>Paris</answer>") == 0.0
    assert exact_match("Paris", "<answer>Paris") == 0.0
    assert exact_match("Paris", "<answer>Paris</answer>", prefilled_think=True) == 0.0
    assert exact_match("Paris", "a</think><answer>Paris</answer>", prefilled_think=True) == 1.0


def test_several_boxes_match_only_where_all_say_the_same():
    assert exact_match("Paris", r"\boxed{Paris}, so \boxed{\text{Paris}}") == 1.0
    assert exact_match("Paris", r"\boxed{London}, no: \boxed{Paris}") == 0.0
    assert choice_match("B", r"\boxed{B}, so \boxed{(B)}") == 1.0
    assert choice_match("B", r"\boxed{B} or \boxed{C}") == 0.0


@pytest.mark.parametrize("gold", [None, "", "  ", r"\text{}", ["Paris"], {"text": "Paris"}])
def test_a_gold_without_text_cannot_be_scored(gold):
    assert exact_match(gold, "<answer>Paris</answer>") is None
    assert choice_match(gold, "<answer>B</answer>") is None


def test_one_letter_is_read_however_it_is_set():
    texts = answers("one letter")
    assert [t for t in texts if read_choice(t) != "B"] == []
    assert [t for t in texts if read_choice(t, choices=CHOICES) != "B"] == []


def test_anything_but_one_letter_of_the_choices_is_no_choice():
    texts = answers("no choice")
    assert [t for t in texts if read_choice(t) is not None] == []
    assert [t for t in texts if choice_match("B", f"<answer>{t}</answer>") != 0.0] == []


def test_with_the_choices_known_their_texts_may_be_said():
    for text in answers("a text of the choices"):
        assert read_choice(text, choices=CHOICES) == "B", text
        assert read_choice(text) is None, text
        assert choice_match("B", f"<answer>{text}</answer>", choices=CHOICES) == 1.0, text


def test_a_letter_with_another_text_than_its_own_is_no_choice():
    texts = answers("another text than its own")
    assert [t for t in texts if read_choice(t, choices=CHOICES) is not None] == []


def test_a_text_that_two_choices_have_is_no_choice_without_its_letter():
    assert read_choice("yes", choices=["yes", "no", "yes"]) is None
    assert read_choice("C) yes", choices=["yes", "no", "yes"]) == "C"


def test_a_letter_is_a_letter_before_it_is_a_text():
    blood_groups = ["B", "A", "AB"]
    assert read_choice("A", choices=blood_groups) == "A"
    assert read_choice("AB", choices=blood_groups) == "C"


def test_an_initial_is_part_of_its_text():
    assert read_choice("A. Lincoln", choices=["G. Washington", "A. Lincoln"]) == "B"


def test_the_letters_end_with_the_number_of_choices():
    assert [read_choice("E", choices=n) for n in (4, 5, 10)] == [None, "E", "E"]
    assert [read_choice("E", choices=["x"] * n) for n in (4, 5)] == [None, "E"]
    assert choice_match("E", "<answer>E</answer>") is None
    assert choice_match("E", "<answer>E</answer>", choices=5) == 1.0
    assert choice_match("E", "<answer>E</answer>", choices=["x"] * 5) == 1.0


@pytest.mark.parametrize("gold", ["Z", "AB", "Paris", 1, 0, "1"])
def test_a_gold_that_is_no_letter_of_the_choices_cannot_be_scored(gold):
    assert choice_match(gold, "<answer>B</answer>") is None
    assert choice_match(gold, "<answer>B</answer>", choices=CHOICES) is None


@pytest.mark.parametrize("gold", ["B", "b", "(B)", " B. "])
def test_a_gold_letter_is_read_as_an_answer_is(gold):
    assert choice_match(gold, "<answer>B</answer>") == 1.0
    assert choice_match(gold, "<answer>C</answer>") == 0.0


@pytest.mark.parametrize("choices", ["ABCD", {"text": ["x"], "label": ["A"]}, [1, 2], [None], 4.0])
def test_choices_that_are_no_texts_cannot_be_scored(choices):
    assert choice_match("A", "<answer>A</answer>", choices=choices) is None


def test_the_rewards_read_columns_options_and_messages():
    chats = [[{"role": "assistant", "content": f"<answer>{x}</answer>"}] for x in ("B", "e", "x")]
    golds = ["B", "E", None]
    assert choice_reward(chats, answer=golds, prompts=["p"] * 3) == [1.0, None, None]
    assert partial(choice_reward, num_choices=5)(completions=chats, answer=golds) == [1, 1, None]
    choices = [["u", "v", "w"], list("uvwxy"), None]
    assert choice_reward(chats, answer=["B", "E", "B"], choices=choices) == [1.0, 1.0, 0.0]
    assert exact_match_reward(chats, answer=["B", "E", None], level=[1, 2, 3]) == [1.0, 0.0, None]
    for reward in (choice_reward, exact_match_reward):
        assert reward(chats[:1], answer=["B"], prefilled_think=True) == [0.0]
        check_rewards({"correct": (reward, 1.0)}, ["answer"])


def test_rows_that_cannot_be_scored_are_found_before_the_first_step():
    columns = {"answer": ["B", "Paris", None, "J"]}
    exact, choice = {"correct": (exact_match_reward, 1)}, {"correct": (choice_reward, 1)}
    assert find_unscorable(exact, columns) == {2: "correct: gold cannot be read: None"}
    found = find_unscorable(choice, columns)
    assert found.keys() == {1, 2}
    assert "expected the letter of a choice, found 'Paris'" in found[1]
    choices = [["x"] * 4, None, ["x"], ["x"] * 4]
    assert find_unscorable(choice, {**columns, "choices": choices}).keys() == {1, 2, 3}
    wrong = {"answer": ["A", "A"], "choices": [["x"], {"text": ["x"]}]}
    assert "expected a list of texts" in find_unscorable(choice, wrong)[1]


HOSTILE = ["<answer>", "</answer>", r"\text{", r"\text{B}", "}", "(", "the ", "answer ", "B) ", " "]


def test_a_megabyte_of_anything_never_hangs_and_never_raises():
    for unit in HOSTILE:
        text = unit * (1_000_000 // len(unit))
        with deadline(30, unit):
            for completion in (text, f"<answer>{text}</answer>", rf"\boxed{{{text}"):
                score = choice_match("A", completion, choices=[text[:3000], "y"])
                assert score in (0.0, None), unit
                assert exact_match("A", completion) == 0.0, unit


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from([*HOSTILE, "A", "b", "\\boxed{", "$"]) | st.text(max_size=5)))
def test_any_text_is_matched_or_not(pieces):
    text = "".join(pieces)
    assert exact_match("B", text) in (0.0, 1.0)
    assert choice_match("B", text, choices=["x", text]) in (0.0, 1.0)
    assert read_choice(text) in (None, *"ABCD")
