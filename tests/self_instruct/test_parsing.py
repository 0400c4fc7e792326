"""Teachers' texts, well formed and not."""

import pytest

from posttrain.self_instruct.filters import Rejected
from posttrain.self_instruct.parsing import (
    parse_instances,
    parse_instructions,
    parse_tasks,
    parse_type,
)
from posttrain.self_instruct.tasks import Task
from tests.cases import read_cases

TWO = """4. Instruction: Add the numbers.
4. Input:
2, 3
4. Output:
5
###
5. Instruction: Name a colour
of the sky.
5. Input:
<noinput>
5. Output:
Blue.

It may be grey.
###"""
FIRST = Task("Add the numbers.", "2, 3", "5")
SECOND = Task("Name a colour\nof the sky.", "", "Blue.\n\nIt may be grey.")


def found(items) -> list:
    """Tasks and texts as they are, reasons for the rejected."""
    return [i.found.reason if isinstance(i.found, Rejected) else i.found for i in items]


def test_tasks_keep_their_three_fields_and_noinput_is_an_empty_input():
    assert found(parse_tasks(TWO, is_cut=False)) == [FIRST, SECOND]


def test_common_variants_are_read_alike():
    cases = read_cases(__file__, "parsing", kind="variant")
    wrong = [c for c in cases if found(parse_tasks(c["text"], is_cut=False)) != [FIRST, SECOND]]
    assert wrong == []


def test_the_last_task_of_a_cut_answer_is_truncated_whether_or_not_it_looks_whole():
    assert found(parse_tasks(TWO, is_cut=True)) == [FIRST, "truncated"]


def test_a_broken_task_is_unparsable_and_its_neighbour_is_not():
    wrong, good = [], "4. Instruction: a\n4. Input:\nb\n4. Output:\nc\n###\n"
    for case in read_cases(__file__, "parsing", kind="broken"):
        items = found(parse_tasks(good + case["text"], is_cut=False))
        wrong += [(case, items)] * (items != [Task("a", "b", "c"), "unparsable", SECOND])
    assert wrong == []


@pytest.mark.parametrize("text", ["", "I cannot help with that."])
def test_an_answer_without_a_task_is_one_unparsable_item(text):
    assert found(parse_tasks(text, is_cut=False)) == ["unparsable"]


def test_an_output_may_hold_lists_and_the_words_input_and_output():
    output = "1. one\n2. two\nOutput: 3\nInput: 4"
    text = f"4. Instruction: Show it.\n4. Input:\n<noinput>\n4. Output:\n{output}\n###"
    assert found(parse_tasks(text, is_cut=False)) == [Task("Show it.", "", output)]


def test_instructions_are_numbered_lines_and_may_run_over_two():
    text = "9. Sort the list.\n10. Explain how\n a kite flies.\n11. "
    expected = ["Sort the list.", "Explain how a kite flies.", "unparsable"]
    assert found(parse_instructions(text + "\n", is_cut=False)) == expected


def test_of_a_cut_list_of_instructions_nothing_is_taken():
    text = "9. Sort the list.\n10. Explain"
    assert found(parse_instructions(text, is_cut=True)) == ["truncated", "truncated"]
    assert found(parse_instructions("Sorry.", is_cut=False)) == ["unparsable"]


def test_the_type_is_the_first_word():
    cases = read_cases(__file__, "parsing", kind="type")
    wrong = [c for c in cases if parse_type(c["text"]) is not c["is_classification"]]
    assert wrong == []


def test_any_other_word_is_no_type():
    for case in read_cases(__file__, "parsing", kind="no type"):
        with pytest.raises(Rejected, match="type unclear"):
            parse_type(case["text"])


def test_instances_are_read_input_first_or_label_first():
    plain = "Example 1\nInput: a\nOutput: b\nc\n\nExample 2\nInput: <noinput>\nOutput: d"
    labelled = "Example 1\nLabel: good\nInput: a\nb\nExample 2\nLabel: bad\nInput: c"
    items = parse_instances(plain, is_classification=False, is_cut=False)
    assert found(items) == [Task("", "a", "b\nc"), Task("", "", "d")]
    items = parse_instances(labelled, is_classification=True, is_cut=False)
    assert found(items) == [Task("", "a\nb", "good"), Task("", "c", "bad")]


def test_instances_in_the_other_order_are_unparsable_and_the_last_of_a_cut_answer_is_truncated():
    text = "Example 1\nLabel: good\nInput: a\nExample 2\nInput: a\nLabel: good"
    items = parse_instances(text, is_classification=True, is_cut=False)
    assert found(items) == [Task("", "a", "good"), "unparsable"]
    items = parse_instances(text, is_classification=True, is_cut=True)
    assert found(items) == [Task("", "a", "good"), "truncated"]
    assert found(parse_instances("", is_classification=True, is_cut=False)) == ["unparsable"]
