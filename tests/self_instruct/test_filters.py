"""Each rule, at its border."""

import pytest

from posttrain.self_instruct.filters import (
    ALPACA_BLACKLIST,
    SELF_INSTRUCT_BLACKLIST,
    Rejected,
    check_contradiction,
    check_instance,
    check_instruction,
)

# The golden case alpaca_instruction_filter: (instruction, reason or none).
GOLDEN = [
    ("x y z", "too short"),
    ("write a poem", "too short"),
    ("a b c d", None),
    ("Write a program to sort numbers", "starts with 'Write a program'"),
    ("?what is this thing", "starts with punctuation"),
    ("describe the image you see", "blacklisted word"),
    ("étudier la langue francaise ici", "starts outside ASCII"),
]


def reason(check, *arguments) -> str | None:
    try:
        check(*arguments)
    except Rejected as rejected:
        return rejected.reason
    return None


@pytest.mark.parametrize(("instruction", "expected"), GOLDEN)
def test_golden_case(instruction, expected):
    assert reason(check_instruction, instruction, ALPACA_BLACKLIST) == expected


@pytest.mark.parametrize(("num_words", "expected"), [(3, "too short"), (4, None), (150, None),
                                                     (151, "too long")])  # fmt: skip
def test_instructions_have_4_to_150_words(num_words, expected):
    assert reason(check_instruction, "word " * num_words, ALPACA_BLACKLIST) == expected


@pytest.mark.parametrize("word", ["Plot", "MAPS", "go to"])
def test_a_listed_word_counts_in_any_case(word):
    text = f"Please {word} the next one"
    assert reason(check_instruction, text, SELF_INSTRUCT_BLACKLIST) == "blacklisted word"


@pytest.mark.parametrize("word", ["profile", "mapping", "withdraw", "going to", "photograph"])
def test_a_part_of_a_word_does_not(word):
    assert reason(check_instruction, f"Explain the {word} to me", ALPACA_BLACKLIST) is None


def test_alpaca_lists_what_self_instruct_lists_and_five_words_more():
    more = set(ALPACA_BLACKLIST) - set(SELF_INSTRUCT_BLACKLIST)
    assert more == {"video", "audio", "music", "flowchart", "diagram"}
    assert reason(check_instruction, "Name a music style now", SELF_INSTRUCT_BLACKLIST) is None


INSTANCES = [
    ("", "an answer", None),
    ("text", "", "no output"),
    ("same", "same", "output is the input"),
    ("text", "It needs this:", "ends with a colon"),
    ("The words are:", "one, two", "ends with a colon"),
]


@pytest.mark.parametrize(("paired_input", "output", "expected"), INSTANCES)
def test_instances(paired_input, output, expected):
    assert reason(check_instance, paired_input, output) == expected


def test_one_input_with_two_outputs_is_a_contradiction_unless_it_is_empty():
    different = "same input, different outputs"
    assert reason(check_contradiction, [("a", "1"), ("b", "2"), ("a", "3")]) == different
    assert reason(check_contradiction, [("a", "1"), ("a", "1")]) is None
    assert reason(check_contradiction, [("", "1"), ("", "2")]) is None
