"""Each rule, at its border."""

from posttrain.self_instruct.filters import (
    ALPACA_BLACKLIST,
    SELF_INSTRUCT_BLACKLIST,
    Rejected,
    check_contradiction,
    check_instance,
    check_instruction,
)
from tests.cases import read_cases


def reason(check, *arguments) -> str | None:
    try:
        check(*arguments)
    except Rejected as rejected:
        return rejected.reason
    return None


def test_instructions_have_4_to_150_words_and_no_listed_word_whole_in_any_case():
    """With the golden case alpaca_instruction_filter."""
    cases = read_cases(__file__, "filters", kind="instruction")
    found = [reason(check_instruction, case["text"], ALPACA_BLACKLIST) for case in cases]
    wrong = [(c, f) for c, f in zip(cases, found, strict=True) if f != c["reason"]]
    assert wrong == []


def test_a_word_of_self_instructs_list_counts():
    text = "Please MAPS the next one"
    assert reason(check_instruction, text, SELF_INSTRUCT_BLACKLIST) == "blacklisted word"


def test_alpaca_lists_what_self_instruct_lists_and_five_words_more():
    more = set(ALPACA_BLACKLIST) - set(SELF_INSTRUCT_BLACKLIST)
    assert more == {"video", "audio", "music", "flowchart", "diagram"}
    assert reason(check_instruction, "Name a music style now", SELF_INSTRUCT_BLACKLIST) is None


def test_instances():
    cases = read_cases(__file__, "filters", kind="instance")
    found = [reason(check_instance, case["input"], case["output"]) for case in cases]
    assert found == [case["reason"] for case in cases]


def test_one_input_with_two_outputs_is_a_contradiction_unless_it_is_empty():
    different = "same input, different outputs"
    assert reason(check_contradiction, [("a", "1"), ("b", "2"), ("a", "3")]) == different
    assert reason(check_contradiction, [("a", "1"), ("a", "1")]) is None
    assert reason(check_contradiction, [("", "1"), ("", "2")]) is None
