"""Conversions: what is written means the same, what would not is removed and counted."""

import itertools

import pytest

from posttrain.data import load_documents, load_pairs, load_unpaired
from posttrain.data.formats import FORMATS
from posttrain.errors import ConfigError, DataError
from posttrain.hygiene.convert import WRITERS, convert
from posttrain.hygiene.rows import RowStream, format_of

from .conftest import SHARED, needs_shared, read

DOCUMENTS = (
    "alpaca", "self_instruct", "messages", "sharegpt", "question_answer", "problem_answer",
    "prompt_completion", "prompt_answer",
)  # fmt: skip
PAIRS = ("preference", "dialogue_pairs")


def converted(write, output, to, rows):
    result = convert(RowStream([write(rows)]), output, to=to)
    return read(output), result


def turns(*texts, keys=("role", "content"), roles=("user", "assistant")):
    speaker, said = keys
    return [{speaker: roles[n % len(roles)], said: text} for n, text in enumerate(texts)]


SHAREGPT = {"keys": ("from", "value"), "roles": ("human", "gpt")}
ANSWER = turns("d", roles=["assistant"])
CONVERSATION = {"messages": turns("Hi", "Hello!", "2 + 2?", "4")}


@pytest.mark.parametrize(
    ("to", "row"),
    [
        ("messages", {"messages": turns("Add.\n\n2 and 2", "4")}),
        ("sharegpt", {"conversations": turns("Add.\n\n2 and 2", "4", **SHAREGPT)}),
        ("prompt_completion", {"prompt": "Add.\n\n2 and 2", "completion": "4"}),
        ("question_answer", {"question": "Add.\n\n2 and 2", "answer": "4"}),
        (
            "self_instruct",
            {"instruction": "Add.", "instances": [{"input": "2 and 2", "output": "4"}]},
        ),
    ],
)
def test_an_alpaca_row_by_hand(write, output, to, row):
    rows, _ = converted(
        write, output, to, [{"instruction": "Add.", "input": "2 and 2", "output": "4", "id": 7}]
    )
    assert rows == [{**row, "id": 7}]


@pytest.mark.parametrize(("source", "target"), itertools.product(DOCUMENTS, DOCUMENTS))
def test_any_two_formats_of_one_question_train_on_the_same_tokens(
    write, output, tmp_path, tokenizer, source, target
):
    rows, _ = converted(write, output, source, [{"prompt": "2 + 2?", "completion": "Well: 4"}])
    other = str(tmp_path / "other.jsonl")
    back, _ = converted(write, other, target, rows)
    assert format_of(next(iter(RowStream([other])))).name == WRITERS[target].format_name
    documents = [
        load_documents(data, tokenizer, template="alpaca", say=lambda _: None)[0]
        for data in ([{"instruction": "2 + 2?", "output": "Well: 4"}], back)
    ]
    assert documents[0] == documents[1]


@pytest.mark.parametrize(("source", "target"), itertools.product(PAIRS, PAIRS))
def test_pairs_stay_the_same_pairs(write, output, tmp_path, tokenizer, source, target):
    pair = {"prompt": turns("Hi", "Hello!", "2 + 2?")}
    pair |= {"chosen": turns("4", roles=["assistant"]), "rejected": turns("5", roles=["assistant"])}
    rows, _ = converted(write, output, source, [pair])
    back, _ = converted(write, str(tmp_path / "other.jsonl"), target, rows)
    loaded = [
        load_pairs(data, tokenizer, template="plain", say=lambda _: None)[0]
        for data in ([pair], back)
    ]
    assert loaded[0] == loaded[1]


def test_a_conversation_keeps_all_its_trained_turns(write, output, tmp_path):
    rows, _ = converted(write, output, "sharegpt", [CONVERSATION])
    assert rows == [{"conversations": turns("Hi", "Hello!", "2 + 2?", "4", **SHAREGPT)}]
    parts, _ = converted(write, str(tmp_path / "parts.jsonl"), "prompt_completion", rows)
    texts = [[turn["content"] for turn in parts[0][side]] for side in ("prompt", "completion")]
    assert texts == [["Hi"], ["Hello!", "2 + 2?", "4"]]
    back, _ = converted(write, str(tmp_path / "back.jsonl"), "messages", parts)
    assert back == [CONVERSATION]


@pytest.mark.parametrize(
    ("to", "row", "reason"),
    [
        ("alpaca", CONVERSATION, "with several turns"),
        ("alpaca", {"messages": turns("x", "y", "z", roles=("system", "user", "assistant"))},
         "with a system turn"),
        ("messages", {"text": "abc"}, "of plain text"),
        ("text", {"prompt": "a", "completion": "b"}, "whose prompt would be trained as well"),
        ("alpaca", {"prompt": "a", "chosen": "b", "rejected": "c"}, "with 2 answers"),
        ("preference", {"prompt": "a", "completion": "b"}, "with 1 answers"),
        ("messages", {"prompt": turns("a", "b", "c"), "completion": ANSWER}, "whose trained turns"),
        ("prompt_completion", {"prompt": "a", "completion": "b", "label": True},
         "whose labels"),
        ("unpaired", {"prompt": "a", "completion": "b"}, "without a label"),
        ("dialogue_pairs", {"prompt": "a", "chosen": "b\n\nHuman: c", "rejected": "d"},
         "part before"),
        ("messages", {"messages": turns("a", "b", "c")}, "turns after the last answer"),
        ("sharegpt", {"messages": turns("a", "b"), "instruction": "c", "output": "d"},
         "whose other columns make the format 'messages'"),
        ("sharegpt", {"instruction": "a", "output": "b", "conversations": "many"},
         "another column 'conversations'"),
    ],
)  # fmt: skip
def test_what_would_lose_its_meaning_is_removed_with_the_reason(write, output, to, row, reason):
    fine = {
        "text": {"text": "fine"},
        "preference": {"prompt": "q", "chosen": "a", "rejected": "b"},
        "dialogue_pairs": {"prompt": "q", "chosen": "a", "rejected": "b"},
        "unpaired": {"prompt": "q", "completion": "a", "label": False},
        "problem_solution": {"problem": "q", "solution": "\\boxed{3}"},
    }.get(to, {"question": "q", "answer": "a"})
    _, result = converted(write, output, to, [fine, row])
    (removed,) = read(output.replace(".jsonl", ".removed.jsonl"))
    assert (result.num_rows, result.num_written) == (2, 1)
    assert result.removed == {removed["reason"]: 1}
    assert reason in removed["reason"]
    assert (removed["row"], removed["record"]) == (2, row)


def test_calculator_marks_and_reference_answers_survive_where_they_have_a_place(write, output):
    """A file of questions keeps GSM8K's text; elsewhere the column `answer` holds the reference."""
    row = {"question": "6 / 2?", "answer": "<<6/2=3>>3\n#### 3"}
    rows, _ = converted(write, output, "problem_answer", [row])
    assert rows == [{"problem": "6 / 2?", "answer": row["answer"]}]
    other = output.replace("out", "other")
    rows, _ = converted(write, other, "messages", [row])
    assert rows == [{"messages": turns("6 / 2?", "3\n#### 3"), "answer": row["answer"]}]


@pytest.mark.parametrize(
    "pair",
    [
        {"prompt": "q", "chosen": "good", "rejected": "bad one"},
        {"prompt": turns("q"), "chosen": turns("good", roles=["assistant"]),
         "rejected": turns("bad one", roles=["assistant"])},
        {"chosen": "\n\nHuman: q\n\nAssistant: good",
         "rejected": "\n\nHuman: q\n\nAssistant: bad one"},
    ],
)  # fmt: skip
def test_a_pair_becomes_two_labelled_answers_that_load_alike(write, output, tokenizer, pair):
    rows, result = converted(write, output, "unpaired", [{**pair, "margin": 1.0}])
    assert (result.num_rows, result.num_written) == (1, 2)
    assert [(row["label"], row["margin"]) for row in rows] == [(True, 1.0), (False, 1.0)]
    settings = {"template": "plain", "say": lambda _: None}
    assert (
        load_unpaired(rows, tokenizer, **settings)[:]
        == load_unpaired([pair], tokenizer, **settings)[:]
    )


def test_tool_calls_are_kept_in_conversations(write, output):
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 2}}}
    asked = {"role": "assistant", "content": "", "tool_calls": [call]}
    row = {"messages": [*turns("2 + 2?"), asked, {"role": "tool", "content": "4"}, *turns("", "4")]}
    del row["messages"][3]
    rows, _ = converted(write, output, "sharegpt", [row])
    back, _ = converted(write, output.replace("out", "back"), "messages", rows)
    assert back == [row]


def test_when_no_row_can_be_converted_that_is_an_error_and_nothing_is_written(write, output):
    with pytest.raises(DataError, match="none of 2 rows can become 'Alpaca': 2 with several turns"):
        converted(write, output, "alpaca", [CONVERSATION] * 2)
    with pytest.raises(FileNotFoundError):
        read(output)
    with pytest.raises(
        ConfigError, match=r"unknown format 'alpacca'; known: alpaca, self_instruct"
    ):
        converted(write, output, "alpacca", [CONVERSATION])


def test_every_format_but_labelled_steps_and_programs_can_be_written():
    programs = {"HumanEval", "MBPP", "MBPP, sanitized", "code problem"}  # judged by their tests
    names = {entry.name for entry in FORMATS} - {"stepwise supervision"} - programs
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
