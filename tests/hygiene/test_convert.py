"""Conversions: what is written means the same, what would not is removed and counted."""

import itertools

import pytest

from posttrain.data import load_documents, load_pairs, load_unpaired
from posttrain.data.formats import FORMATS
from posttrain.data.read import Row
from posttrain.errors import ConfigError, DataError
from posttrain.hygiene.convert import WRITERS, convert
from posttrain.hygiene.rows import RowStream, format_of
from tests.cases import read_cases

from .conftest import SHARED, needs_shared, read

DOCUMENTS = (
    *("alpaca", "self_instruct", "messages", "sharegpt"),
    *("question_answer", "problem_answer", "prompt_completion", "prompt_answer"),
)
PAIRS = ("preference", "dialogue_pairs")


@pytest.fixture
def converted(write, tmp_path):
    """Converts rows; returns what was written, what was removed, and the result."""
    numbers = itertools.count()

    def convert_rows(to, rows):
        output = tmp_path / f"converted{next(numbers)}.jsonl"
        result = convert(RowStream([write(rows)]), str(output), to=to)
        return read(output), read(output.with_suffix(".removed.jsonl")), result

    return convert_rows


def turns(*texts, keys=("role", "content"), roles=("user", "assistant")):
    speaker, said = keys
    return [{speaker: roles[n % len(roles)], said: text} for n, text in enumerate(texts)]


SHAREGPT = {"keys": ("from", "value"), "roles": ("human", "gpt")}
CONVERSATION = {"messages": turns("Hi", "Hello!", "2 + 2?", "4")}


def test_an_alpaca_row_by_hand(converted):
    row = {"instruction": "Add.", "input": "2 and 2", "output": "4", "id": 7}
    cases = read_cases(__file__, "convert", kind="one Alpaca row")
    written = [converted(case["to"], [row])[0] for case in cases]
    assert written == [[{**case["row"], "id": 7}] for case in cases]


def test_any_two_formats_of_one_question_train_on_the_same_tokens(converted, tokenizer):
    def load(rows):
        return load_documents(rows, tokenizer, template="alpaca", say=lambda _: None)[:]

    expected = load([{"instruction": "2 + 2?", "output": "Well: 4"}])
    wrong = []
    for source in DOCUMENTS:
        rows, *_ = converted(source, [{"prompt": "2 + 2?", "completion": "Well: 4"}])
        for target in DOCUMENTS:
            back, *_ = converted(target, rows)
            name = format_of(Row(back[0], "back", 1)).name
            wrong += [(source, target, name)] * (name != WRITERS[target].format_name)
            wrong += [(source, target, back)] * (load(back) != expected)
    assert wrong == []


def test_pairs_stay_the_same_pairs(converted, tokenizer):
    def load(rows):
        return load_pairs(rows, tokenizer, template="plain", say=lambda _: None)[:]

    pair = {"prompt": turns("Hi", "Hello!", "2 + 2?")}
    pair |= {"chosen": turns("4", roles=["assistant"]), "rejected": turns("5", roles=["assistant"])}
    expected = load([pair])
    for source in PAIRS:
        rows, *_ = converted(source, [pair])
        for target in PAIRS:
            back, *_ = converted(target, rows)
            assert load(back) == expected, (source, target)


def test_a_conversation_keeps_all_its_trained_turns(converted):
    rows, *_ = converted("sharegpt", [CONVERSATION])
    assert rows == [{"conversations": turns("Hi", "Hello!", "2 + 2?", "4", **SHAREGPT)}]
    parts, *_ = converted("prompt_completion", rows)
    texts = [[turn["content"] for turn in parts[0][side]] for side in ("prompt", "completion")]
    assert texts == [["Hi"], ["Hello!", "2 + 2?", "4"]]
    back, *_ = converted("messages", parts)
    assert back == [CONVERSATION]


FINE = {  # a row of each format that can be written in it
    "text": {"text": "fine"},
    "preference": {"prompt": "q", "chosen": "a", "rejected": "b"},
    "dialogue_pairs": {"prompt": "q", "chosen": "a", "rejected": "b"},
    "unpaired": {"prompt": "q", "completion": "a", "label": False},
    "problem_solution": {"problem": "q", "solution": "\\boxed{3}"},
}


def test_what_would_lose_its_meaning_is_removed_with_the_reason(converted):
    wrong = []
    for case in read_cases(__file__, "convert", kind="removed"):
        fine = FINE.get(case["to"], {"question": "q", "answer": "a"})
        _, (removed,), result = converted(case["to"], [fine, case["row"]])
        counts = (result.num_rows, result.num_written, result.removed)
        is_counted = counts == (2, 1, {removed["reason"]: 1})
        is_kept = (removed["row"], removed["record"]) == (2, case["row"])
        is_right = case["reason"] in removed["reason"] and is_counted and is_kept
        wrong += [(case, removed, counts)] * (not is_right)
    assert wrong == []


def test_calculator_marks_and_reference_answers_survive_where_they_have_a_place(converted):
    """A file of questions keeps GSM8K's text; elsewhere the column `answer` holds the reference."""
    row = {"question": "6 / 2?", "answer": "<<6/2=3>>3\n#### 3"}
    rows, *_ = converted("problem_answer", [row])
    assert rows == [{"problem": "6 / 2?", "answer": row["answer"]}]
    rows, *_ = converted("messages", [row])
    assert rows == [{"messages": turns("6 / 2?", "3\n#### 3"), "answer": row["answer"]}]


LABELLED = [
    {"prompt": "q", "chosen": "good", "rejected": "bad one"},
    {
        "prompt": turns("q"),
        "chosen": turns("good", roles=["assistant"]),
        "rejected": turns("bad one", roles=["assistant"]),
    },
    {
        "chosen": "\n\nHuman: q\n\nAssistant: good",
        "rejected": "\n\nHuman: q\n\nAssistant: bad one",
    },
]


@pytest.mark.parametrize("pair", LABELLED, ids=["texts", "messages", "dialogues"])
def test_a_pair_becomes_two_labelled_answers_that_load_alike(converted, tokenizer, pair):
    rows, _, result = converted("unpaired", [{**pair, "margin": 1.0}])
    assert (result.num_rows, result.num_written) == (1, 2)
    assert [(row["label"], row["margin"]) for row in rows] == [(True, 1.0), (False, 1.0)]
    settings = {"template": "plain", "say": lambda _: None}
    assert (
        load_unpaired(rows, tokenizer, **settings)[:]
        == load_unpaired([pair], tokenizer, **settings)[:]
    )


def test_tool_calls_are_kept_in_conversations(converted):
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 2}}}
    asked = {"role": "assistant", "content": "", "tool_calls": [call]}
    row = {"messages": [*turns("2 + 2?"), asked, {"role": "tool", "content": "4"}, *turns("", "4")]}
    del row["messages"][3]
    rows, *_ = converted("sharegpt", [row])
    back, *_ = converted("messages", rows)
    assert back == [row]


def test_when_no_row_can_be_converted_that_is_an_error_and_nothing_is_written(converted, tmp_path):
    with pytest.raises(DataError, match="none of 2 rows can become 'Alpaca': 2 with several turns"):
        converted("alpaca", [CONVERSATION] * 2)
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]
    with pytest.raises(
        ConfigError, match=r"unknown format 'alpacca'; known: alpaca, self_instruct"
    ):
        converted("alpacca", [CONVERSATION])


def test_every_format_but_labelled_steps_and_programs_can_be_written():
    programs = {"HumanEval", "MBPP", "MBPP, sanitized", "code problem"}  # judged by their tests
    same = {"question pairs", "instruction pairs", "conversation pairs"}  # as preference
    steps = {"stepwise supervision", "PRM800K"}
    names = {entry.name for entry in FORMATS} - steps - programs - same
    assert {writer.format_name for writer in WRITERS.values()} == names


@needs_shared
def test_real_files_are_converted_whole(output):
    """HH-RLHF: five dialogues part before the last answer, as the loaders say."""
    result = convert(
        RowStream([SHARED / "hh_rlhf" / "harmless-base-test.jsonl.gz"]), output, to="preference"
    )
    assert (result.num_rows, result.num_written) == (2312, 2307)
    other = output.replace("out", "gsm8k")
    result = convert(RowStream([SHARED / "gsm8k" / "test.jsonl"]), other, to="messages")
    assert result.num_written == 1319
    assert result.removed == {}
