"""Answers and steps that are labelled good or bad."""

import itertools
import re

import pytest

from posttrain.data import load_documents, load_prompts, load_steps, load_unpaired
from posttrain.errors import DataError
from tests.data.conftest import data_error

GOOD = {"prompt": "q", "completion": "yes", "label": True}
BAD = {"prompt": "q", "completion": "no", "label": False}
STEPS = {"prompt": "1+1+1?", "completions": ["1+1=2", " 2+1=4 "], "labels": [True, False]}


def texts(tokenizer, rows, column):
    return [tokenizer.decode(ids) for ids in rows[column]]


def test_labelled_answers_hold_prompt_answer_and_label(tokenizer, quiet):
    rows = load_unpaired([GOOD, BAD], tokenizer, template="plain", say=quiet)
    assert texts(tokenizer, rows, "prompt_ids") == ["q", "q"]
    assert texts(tokenizer, rows, "completion_ids") == ["yes</s>", "no</s>"]
    assert rows["label"][:] == [True, False]
    assert "rows of unpaired preference" in quiet.lines[0]
    assert "-> 2 labelled answers (1 good)" in quiet.lines[0]
    assert quiet.lines[1].endswith("q«yes</s>» | label: good")


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q", "chosen": "yes", "rejected": "no"},
        {"chosen": "\n\nHuman: q\n\nAssistant: yes", "rejected": "\n\nHuman: q\n\nAssistant: no"},
    ],
)
def test_a_pair_is_a_good_answer_and_a_bad_one(chat_tokenizer, row, quiet):
    pair = load_unpaired([row], chat_tokenizer, say=quiet)
    single = load_unpaired([GOOD, BAD], chat_tokenizer, say=quiet)
    assert pair[:] == single[:]


def test_an_answer_that_is_too_long_leaves_the_other_of_its_pair(tokenizer, quiet):
    row = {"prompt": "q", "chosen": "much too long", "rejected": "no"}
    (answer,) = load_unpaired([row], tokenizer, template="plain", max_length=5, say=quiet)
    assert (answer["label"], tokenizer.decode(answer["completion_ids"])) == (False, "no</s>")
    assert "dropped 1: 1 longer than 5 tokens (first: row 1)" in quiet.lines[0]


def test_documents_and_prompts_of_labelled_answers_train_on_no_bad_one(tokenizer, quiet):
    documents = load_documents([GOOD, BAD], tokenizer, template="plain", say=quiet)
    assert texts(tokenizer, documents, "input_ids") == ["qyes</s>"]
    assert "dropped 1: 1 labelled as a bad answer (first: row 2)" in quiet.lines[0]
    assert len(load_prompts([GOOD, BAD], tokenizer, template="plain", say=quiet)) == 2


def test_labels_of_csv_files_are_read(tokenizer, quiet):
    labels = [1, 0, "True", "false", "0"]
    rows = [GOOD | {"label": label} for label in labels]
    loaded = load_unpaired(rows, tokenizer, template="plain", say=quiet)
    assert loaded["label"][:] == [True, False, True, False, False]


def test_a_label_of_another_kind_is_an_error(tokenizer, quiet):
    for label in ("sports", 2, [True], 0.5):
        error = data_error(load_unpaired, [GOOD | {"label": label}], tokenizer, say=quiet)
        assert re.search(r"row 1: 'label' is .* expected true or false", error), label


def test_a_row_without_its_label_is_an_error(tokenizer, quiet):
    with pytest.raises(DataError, match=r"row 2: no 'label'\. .* 'unpaired preference' needs"):
        load_unpaired([GOOD, {"prompt": "q", "completion": "a"}], tokenizer, say=quiet)


def test_steps_end_at_their_newline_and_at_the_end_token(tokenizer, quiet):
    (row,) = load_steps([STEPS], tokenizer, template="plain", say=quiet)
    ids = row["completion_ids"]
    assert tokenizer.decode(ids) == "1+1=2\n2+1=4</s>"
    assert tokenizer.decode(row["prompt_ids"]) == "1+1+1?"
    starts = [0, *(end + 1 for end in row["step_ends"])]
    pieces = [tokenizer.decode(ids[a:b]) for a, b in itertools.pairwise(starts)]
    assert pieces == ["1+1=2\n", "2+1=4</s>"]
    assert row["labels"] == [True, False]


@pytest.mark.parametrize("separator", [" ", "\n\n", "; "])
def test_steps_are_joined_by_the_separator_and_judged_at_its_last_token(
    tokenizer, quiet, separator
):
    given = {"template": "plain", "separator": separator, "say": quiet}
    (row,) = load_steps([STEPS], tokenizer, **given)
    ids, (first, last) = row["completion_ids"], row["step_ends"]
    assert tokenizer.decode(ids) == f"1+1=2{separator}2+1=4</s>"
    assert tokenizer.decode(ids[: first + 1]) == f"1+1=2{separator}"
    assert last == len(ids) - 1


def test_steps_stand_in_one_turn_of_the_chat_template(chat_tokenizer, quiet):
    (row,) = load_steps([STEPS], chat_tokenizer, say=quiet)
    assert chat_tokenizer.decode(row["completion_ids"]) == "1+1=2\n2+1=4<|im_end|>"
    assert row["step_ends"][-1] == len(row["completion_ids"]) - 1


def test_equal_steps_are_two_steps(tokenizer, quiet):
    rows = load_steps([STEPS | {"completions": ["a", "a"]}], tokenizer, template="plain", say=quiet)
    assert len(rows["step_ends"][0]) == 2


def test_a_template_that_rewrites_the_steps_is_an_error(make_tokenizer, quiet):
    template = "{% for m in messages %}{{ m['content'].replace('\n', ' ') + '</s>' }}{% endfor %}"
    with pytest.raises(DataError, match="row 1: the template 'chat' rewrites the steps"):
        load_steps([STEPS], make_tokenizer(chat_template=template), say=quiet)


def test_a_loader_that_cannot_use_labelled_rows_names_the_one_that_can(tokenizer, quiet):
    with pytest.raises(
        DataError, match=r"'stepwise supervision', .* Use load_steps or load_prompts"
    ):
        load_documents([STEPS], tokenizer, say=quiet)


def rated(text, rating, **more):
    return {"text": text, "rating": rating, "flagged": None} | more


def solution(*steps, **label):
    """A row of PRM800K, with the columns of which nothing is read."""
    keys = ("completions", "chosen_completion", "human_completion")
    steps = [dict(zip(keys, (*step, None), strict=False)) for step in steps]
    return {
        "labeler": "a", "timestamp": "2023", "generation": 9,
        "is_quality_control_question": False, "is_initial_screening_question": False,
        "question": {"problem": "1+1+1?", "ground_truth_answer": "3"},
        "label": {"steps": steps, "total_time": 1, "finish_reason": "found_error"} | label,
    }  # fmt: skip


def judged(tokenizer, rows):
    """The texts up to each judged step, and the label."""
    return [
        (tokenizer.decode(row["completion_ids"][: end + 1]), label)
        for row in rows
        for end, label in zip(row["step_ends"], row["labels"], strict=True)
    ]


def test_each_rating_of_prm800k_is_one_label(tokenizer, quiet):
    """The chosen steps in one solution; each other step behind those before it."""
    row = solution(
        ([rated("so", 0), rated("hm", None), rated("oh", 1, flagged=True)], 0),
        ([rated("no", -1)], None, "1+1=2"),
        ([rated("3", 1), rated("4", -1)], 0),
        ([rated("end", -1), rated("fin", 0)], None),
    )
    rows = load_steps([row], tokenizer, template="plain", say=quiet)
    assert judged(tokenizer, rows) == [
        ("so\n", True),
        ("so\n1+1=2\n", True),
        ("so\n1+1=2\n3</s>", True),
        ("so\nno</s>", False),
        ("so\n1+1=2\n4</s>", False),
        ("so\n1+1=2\n3\nend</s>", False),
        ("so\n1+1=2\n3\nfin</s>", True),
    ]
    assert texts(tokenizer, rows, "prompt_ids") == ["1+1+1?"] * 5


def test_solutions_of_prm800k_without_a_label_are_left_out_and_counted(tokenizer, quiet):
    good = solution(([rated("so", 1)], 0))
    broken = solution(([rated("so", 1)], 0), finish_reason="bad_problem")
    unrated = solution(([rated("so", None)], 0))
    rows = load_steps([good, broken, unrated], tokenizer, template="plain", say=quiet)
    assert len(rows) == 1
    assert "1 whose problem its labeller found broken" in quiet.lines[0]
    assert "1 without a rated step" in quiet.lines[0]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            solution(([rated("so", 2)], 0)),
            r"'label.steps[0].completions[0].rating' is a number (2)",
        ),
        (solution(([rated("so", 1)], 1)), "'label.steps[0].chosen_completion' is a number (1)"),
        (solution(([{"rating": 1}], 0)), "'label.steps[0].completions[0].text' is nothing"),
        (solution(steps=None), "'label.steps' is nothing"),
        (solution() | {"label": "+"}, "'label' is text (+); expected an object, as in PRM800K"),
        (solution() | {"question": {}}, "'question.problem' is nothing"),
    ],
)
def test_rows_that_are_not_prm800ks_are_errors_with_their_place(tokenizer, quiet, row, message):
    with pytest.raises(DataError, match=re.escape(message)) as raised:
        load_steps([row], tokenizer, template="plain", say=quiet)
    assert "row 1" in str(raised.value)
