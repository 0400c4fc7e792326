"""Formats are found from the columns, and each gives the prompt and answers it should."""

import re

import pytest

from posttrain.data import read_records
from posttrain.data.example import (
    DroppedRow,
    last_boxed,
    reference_answer,
    without_calculator_marks,
)
from posttrain.data.formats import (
    DOCUMENTS,
    FORMATS,
    PAIRS,
    PROMPTS,
    UNPAIRED,
    detect_format,
    parse_row,
)
from posttrain.data.formats import STEPS as STEP_LABELS
from posttrain.errors import DataError
from tests.cases import read_cases
from tests.data.conftest import data_error

USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
OTHER = {"role": "assistant", "content": "b"}


def parse(row, need=DOCUMENTS):
    records = read_records([row])
    (parsed,) = [parse_row(detect_format(records, need), row) for row in records]
    return parsed


def one(row, need=DOCUMENTS):
    (example,) = parse(row, need)
    return example


def test_documents_of_every_format_hold_the_same_question_and_answer():
    wrong = []
    for case in read_cases(__file__, "formats", kind="question and answer"):
        name = detect_format(read_records([case["row"]]), DOCUMENTS).name
        example = one(case["row"])
        found = (name, example.instruction, example.answers[0]["content"])
        wrong += [(case, found)] * (found != (case["name"], "q", "a"))
    assert wrong == []


def test_pairs_of_every_format_hold_the_same_question_and_answers():
    wrong = []
    for case in read_cases(__file__, "formats", kind="pair"):
        example = one(case["row"], PAIRS)
        wrong += [case] * ((example.turns, example.answers) != ((USER,), (ANSWER, OTHER)))
    assert wrong == []


SYSTEM = {"role": "system", "content": "s"}
STEPS = {"prompt": "q", "completions": ["a", "b"], "labels": [True, False]}


def test_the_formats_of_the_ecosystem_are_found_from_columns_alone():
    """Whatever stands beside them, in whichever order the columns are."""
    wrong, others = [], {"id": 7, "source": "x"}
    for case in read_cases(__file__, "formats", kind="columns"):
        row = case["row"]
        for each in (row, others | row, dict(reversed((row | others).items()))):
            name = detect_format(read_records([each]), case["need"]).name
            (example,) = parse(each, case["need"])
            contents = [turn["content"] for turn in (*example.turns, *example.answers)]
            are_kept = contents in (["a"], ["q"], ["q", "a"], ["q", "a", "b"])
            wrong += [(each, name, contents)] * (name != case["name"] or not are_kept)
    assert wrong == []


def test_labels_of_answers_and_of_steps_are_kept():
    assert one({"prompt": "q", "completion": "a", "label": False}, UNPAIRED).labels == (False,)
    assert one(STEPS, STEP_LABELS).labels == (True, False)


def test_pairs_of_several_turns_share_all_but_the_last_answer():
    history = [SYSTEM, USER, ANSWER, USER]
    for row in (
        {"chosen": [*history, ANSWER], "rejected": [*history, OTHER]},
        {"prompt": history, "chosen": [ANSWER], "rejected": [OTHER]},
        {"prompt": history, "chosen": [*history, ANSWER], "rejected": [*history, OTHER]},
        {
            "prompt": history[:2],
            "chosen": [*history[2:], ANSWER],
            "rejected": [*history[2:], OTHER],
        },
    ):
        example = one(row, PAIRS)
        assert example.turns == tuple(history)
        assert example.answers == (ANSWER, OTHER)


@pytest.mark.parametrize(
    ("chosen", "rejected", "texts"),
    [
        ("The sky is blue.", "The sky is green.", ("The sky is", " blue.", " green.")),
        ("The sky is blue.", "The sky is black.", ("The sky is", " blue.", " black.")),
        ("It\n\nis", "It\n\nis not", ("It", "\n\nis", "\n\nis not")),
    ],
)
def test_texts_without_marks_part_at_the_first_word_that_differs(chosen, rejected, texts):
    example = one({"chosen": chosen, "rejected": rejected}, PAIRS)
    assert example.texts == texts
    assert example.turns[0]["content"] == texts[0]


@pytest.mark.parametrize("pair", [("Blue.", "Green."), ("yes", "yet"), ("a b", "a b\n\nHuman: c")])
def test_texts_without_a_word_in_common_or_with_marks_in_one_alone_are_dropped(pair):
    with pytest.raises(DroppedRow, match="share no prompt"):
        one(dict(zip(("chosen", "rejected"), pair, strict=True)), PAIRS)


def test_text_is_a_document_without_a_prompt():
    example = one({"text": "whole"})
    assert (example.turns, example.texts) == ((), ("", "whole"))


@pytest.mark.parametrize("blank", ["", "  ", "<noinput>", None])
def test_alpaca_rows_without_an_input_have_none(blank):
    assert one({"instruction": "q", "input": blank, "output": "a"}).input == ""


def test_a_task_with_two_instances_is_two_examples():
    instances = [{"input": "x", "output": "a"}, {"input": "y", "output": "b"}]
    examples = parse({"instruction": "q", "instances": instances})
    assert [(e.input, e.answers[0]["content"]) for e in examples] == [("x", "a"), ("y", "b")]


def test_every_assistant_turn_of_a_conversation_is_a_target_and_later_turns_are_not_kept():
    example = one({"messages": [USER, ANSWER, USER, OTHER, USER]})
    assert example.first_trained == 0
    assert (example.turns, example.answers) == ((USER, ANSWER, USER), (OTHER,))


def test_earlier_answers_in_the_prompt_of_a_completion_are_not_targets():
    example = one({"prompt": [USER, ANSWER, USER], "completion": [OTHER]})
    assert example.first_trained == 3


def test_message_content_in_parts_is_joined():
    parts = [{"type": "text", "text": "q"}, {"type": "text", "text": "q"}]
    example = one({"messages": [{"role": "user", "content": parts}, ANSWER]})
    assert example.turns[0]["content"] == "qq"


def test_dialogues_split_after_the_last_answer_mark_they_share():
    shared = "\n\nHuman: q\n\nAssistant: a\n\nHuman: q\n\nAssistant:"
    example = one({"chosen": shared + " yes", "rejected": shared + " yet"}, PAIRS)
    assert example.texts == (shared, " yes", " yet")
    assert example.turns == (USER, ANSWER, USER)


WORKED = "16 - 3 = <<16-3=13>>13 left.\n500 * 2 = $<<500*2=1000>>1,000\n#### 1,000"


def test_gsm8k_gold_is_the_number_and_the_worked_text_loses_only_its_calculator_marks():
    example = one({"question": "q", "answer": WORKED})
    assert (example.gold, example.gold_rule) == ("1000", "####")
    assert example.answers[0]["content"] == "16 - 3 = 13 left.\n500 * 2 = $1,000\n#### 1,000"


def test_reference_answers_by_hand():
    cases = read_cases(__file__, "reference_answers")
    found = [reference_answer(case["text"]) for case in cases]
    assert found == [(case["gold"], case["rule"]) for case in cases]


def test_an_unclosed_box_holds_nothing():
    assert last_boxed(r"\boxed{1") is None


def test_shift_operators_in_code_are_no_calculator_marks():
    code = "cout << x << endl; a<<2>>1"
    assert without_calculator_marks(code) == code


def test_maths_solutions_take_the_gold_from_the_answer_column_or_the_box():
    row = {"problem": "q", "solution": r"so \boxed{4}"}
    assert one(row).gold == "4"
    assert one(row | {"answer": 5}).gold == "5"
    assert one({"problem": "q", "solution": "a proof"}).gold is None


HUMAN_EVAL = {
    "task_id": "HumanEval/999",
    "prompt": "def twice(x):\n    'Twice x.'\n",
    "canonical_solution": "    return 2 * x\n",
    "test": "def check(candidate):\n    assert candidate(2) == 4\n",
    "entry_point": "twice",
}
MBPP = {"task_id": 9, "code": "def twice(x): return 2 * x", "test_list": ["assert a", "assert b"]}


def test_human_eval_gives_the_head_as_prompt_and_its_check_as_test():
    example = one(HUMAN_EVAL, PROMPTS)
    assert example.texts == (HUMAN_EVAL["prompt"],)
    check = {"check": HUMAN_EVAL["test"], "entry_point": "twice", "prompt": HUMAN_EVAL["prompt"]}
    assert example.tests == [check]


IMPORTS = ["import math", "import re"]
EDITIONS = [
    ({"text": "Double.", **MBPP}, "MBPP", ""),
    ({"text": "Double.", **MBPP, "test_setup_code": "x = 1"}, "MBPP", "x = 1"),
    ({"prompt": "Double.", **MBPP}, "MBPP, sanitized", ""),
    (
        {"prompt": "Double.", **MBPP, "test_imports": IMPORTS},
        "MBPP, sanitized",
        "import math\nimport re",
    ),
]


@pytest.mark.parametrize(("row", "name", "setup"), EDITIONS)
def test_mbpp_shows_its_first_test_alone_and_is_judged_by_all(row, name, setup):
    row = {**row, "challenge_test_list": ["assert c"]}
    assert detect_format(read_records([row]), PROMPTS).name == name
    example = one(row, PROMPTS)
    assert example.texts == ("Double.\n\nFor example:\n\n```python\nassert a\n```",)
    tests = [(test["assert"], test["setup"]) for test in example.tests]
    assert tests == [("assert a", setup), ("assert b", setup), ("assert c", setup)]


def test_mbpp_without_tests_is_left_out():
    with pytest.raises(DroppedRow, match="without tests"):
        one({"text": "Double.", **MBPP, "test_list": []}, PROMPTS)


def test_a_question_with_tests_is_a_prompt():
    row = {"question": "q", "tests": [{"stdin": "", "stdout": "1"}], "solution": "print(1)"}
    assert detect_format(read_records([row]), PROMPTS).name == "code problem"
    assert one(row, PROMPTS).texts == ("q",)


def test_a_numeric_answer_is_read_as_its_text():
    assert one({"question": "q", "answer": 2}).gold == "2"


def test_a_column_of_answers_beside_another_format_holds_the_gold():
    row = {"prompt": "q", "completion": "c", "answer": "#### 3"}
    assert one(row, PROMPTS).gold == "3"


def test_misspelt_columns_are_named_with_the_formats_that_are_known():
    records = read_records([{"prompt": "q", "choosen": "a", "rejected": "b"}])
    with pytest.raises(DataError, match="Did you mean 'chosen' for 'choosen'") as error:
        detect_format(records, PAIRS)
    for entry in FORMATS:
        assert (" + ".join(entry.columns) + f" ({entry.name})" in str(error.value)) == (
            PAIRS in entry.gives
        )


def test_data_of_another_kind_is_told_apart_from_unknown_data():
    records = read_records([{"chosen": "a", "rejected": "b"}])
    gives = "which gives pairs or prompts or labelled answers, not documents.* Use load_pairs or"
    with pytest.raises(DataError, match=f"'dialogue pairs', {gives}"):
        detect_format(records, DOCUMENTS)


def test_a_missing_field_is_an_error_with_file_row_field_and_remedy(write):
    rows = [{"prompt": "q", "chosen": "a", "rejected": "b"}, {"prompt": "q", "chosen": "a"}]
    records = read_records(write("pairs.jsonl", rows))
    entry = detect_format(records, PAIRS)
    with pytest.raises(
        DataError,
        match=r"pairs\.jsonl, row 2: no 'rejected'\. .* needs prompt, "
        r"chosen, rejected; found: prompt, chosen\.",
    ):
        [parse_row(entry, row) for row in records]


def test_a_wrong_type_in_a_field_is_an_error_that_names_it():
    wrong = []
    for case in read_cases(__file__, "wrong_fields"):
        error = data_error(parse, case["row"], case["need"])
        wrong += [(case, error)] * (not re.search(case["message"], error))
    assert wrong == []
