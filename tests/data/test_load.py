"""Rows to token ids: what is trained, what is dropped and counted, what is refused."""

import json
import sys

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from posttrain.data import load_documents, load_pairs, load_prompts
from posttrain.errors import DataError
from posttrain.rewards.code import code_reward

ALPACA = {"instruction": "Add 1 and 2.", "output": "3 é"}
PAIR = {"prompt": "q", "chosen": "good", "rejected": "bad one"}
FORMAT_ROWS = [
    ALPACA,
    ALPACA | {"input": "now"},
    {"instruction": "q", "instances": [{"input": "", "output": "3 é"}]},
    {"prompt": "q", "completion": "3 é"},
    {"question": "q", "answer": "3 é"},
    {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "3 é"}]},
]


def trained_ids(document):
    pairs = zip(document["input_ids"], document["trained"], strict=True)
    return [token for token, trained in pairs if trained]


@pytest.mark.parametrize("row", FORMAT_ROWS, ids=lambda row: "+".join(row))
@pytest.mark.parametrize("which", ["tokenizer", "bos_tokenizer"])
def test_the_trained_tokens_are_the_answer_and_its_end(request, row, which, quiet):
    tokenizer = request.getfixturevalue(which)
    (document,) = load_documents([row], tokenizer, say=quiet)
    assert tokenizer.decode(trained_ids(document)).lstrip() == "3 é</s>"
    assert not document["trained"][0]


def test_prompt_and_answer_ids_are_their_own_tokenisations_joined(bos_tokenizer, quiet):
    row = {"prompt": "What is", "completion": " this?"}
    (document,) = load_documents([row], bos_tokenizer, template="plain", say=quiet)
    prompt = bos_tokenizer("What is")["input_ids"]
    answer = bos_tokenizer(" this?", add_special_tokens=False)["input_ids"]
    assert document["input_ids"] == [*prompt, *answer, bos_tokenizer.eos_token_id]
    assert document["trained"] == [False] * len(prompt) + [True] * (len(answer) + 1)
    assert document["input_ids"].count(bos_tokenizer.bos_token_id) == 1


def test_trained_marks_are_the_labels_of_alpaca():
    """Golden case alpaca_label_masking: prompt 5 6 7 8, answer 9 10 and the end token 2."""
    from posttrain.data.encode import Encoder
    from posttrain.data.example import Segment

    vocabulary = {str(number): number for number in range(11)} | {"unknown": 11}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="unknown"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="2")
    segments = [Segment("5 6 7 8"), Segment("9 10", trained=True, ends=True)]
    ((ids, trained),) = Encoder(tokenizer).documents([segments], add_bos=True)
    assert ids == [5, 6, 7, 8, 9, 10, 2]
    labels = [token if is_target else -100 for token, is_target in zip(ids, trained, strict=True)]
    assert labels == [-100, -100, -100, -100, 9, 10, 2]


def test_a_tokenizer_that_pads_texts_with_a_space_does_not_do_so_before_an_answer(quiet):
    """SentencePiece vocabularies: "q" is "▁q" alone, but an answer " a" stays "▁a"."""
    letters = ["▁", "\n", *"qa:", "</s>"]
    backend = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(letters)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    backend.decoder = decoders.Metaspace(prepend_scheme="always", split=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    row = {"prompt": "q:", "chosen": " a", "rejected": "a"}
    (pair,) = load_pairs([row], tokenizer, template="plain", say=quiet)
    assert tokenizer.convert_ids_to_tokens(pair["prompt_ids"]) == ["▁", "q", ":"]
    assert tokenizer.convert_ids_to_tokens(pair["chosen_ids"]) == ["▁", "a", "</s>"]
    assert tokenizer.convert_ids_to_tokens(pair["rejected_ids"]) == ["a", "</s>"]


def test_an_answer_that_brings_its_own_end_token_is_not_ended_twice(tokenizer, quiet):
    (document,) = load_documents([ALPACA | {"output": "3</s>"}], tokenizer, say=quiet)
    assert tokenizer.decode(trained_ids(document)) == "3</s>"


@pytest.mark.parametrize(("which", "first"), [("tokenizer", "b</s>"), ("bos_tokenizer", "ab</s>")])
def test_every_token_of_a_text_is_trained_but_the_first(request, which, first, quiet):
    tokenizer = request.getfixturevalue(which)
    (document,) = load_documents([{"text": "ab"}], tokenizer, say=quiet)
    assert tokenizer.decode(trained_ids(document)) == first


def test_plain_conversations_train_each_assistant_turn_with_an_end(tokenizer, quiet):
    turns = [("user", "q"), ("assistant", "a"), ("user", "r"), ("assistant", "b")]
    row = {"messages": [{"role": role, "content": content} for role, content in turns]}
    (document,) = load_documents([row], tokenizer, say=quiet)
    text = "\n\nHuman: q\n\nAssistant: a</s>\n\nHuman: r\n\nAssistant: b</s>"
    assert tokenizer.decode(document["input_ids"]) == text
    assert tokenizer.decode(trained_ids(document)) == " a</s> b</s>"


def test_pairs_hold_prompt_and_ended_answers_apart(tokenizer, quiet):
    (pair,) = load_pairs([PAIR], tokenizer, template="plain", say=quiet)
    decoded = [tokenizer.decode(pair[name]) for name in pair]
    assert dict(zip(pair, decoded, strict=True)) == {
        "prompt_ids": "q",
        "chosen_ids": "good</s>",
        "rejected_ids": "bad one</s>",
    }


def test_pairs_carry_their_margin_where_the_data_has_one(tokenizer, quiet):
    """The second pair is too long, and its margin goes with it."""
    rows = [
        PAIR | {"margin": 1},
        PAIR | {"chosen": "good" * 9, "margin": 2},
        PAIR | {"margin": 0.5},
    ]
    settings = {"template": "plain", "max_length": 20, "say": quiet}
    assert load_pairs(rows, tokenizer, **settings)["margin"] == [1.0, 0.5]
    assert "margin" not in load_pairs([PAIR], tokenizer, **settings).column_names
    with pytest.raises(DataError, match="row 1: 'margin' is text"):
        load_pairs([PAIR | {"margin": "large"}], tokenizer, **settings)


def test_prompts_keep_the_columns_and_hold_the_gold_in_answer(tokenizer, quiet):
    rows = [{"question": "6*7?", "answer": "6*7=<<6*7=42>>42\n#### 42", "level": 3}]
    (prompt,) = load_prompts(rows, tokenizer, say=quiet)
    assert (prompt["question"], prompt["answer"], prompt["level"]) == ("6*7?", "42", 3)
    assert prompt["prompt"].endswith("User: 6*7?\nAssistant:")
    assert tokenizer.decode(prompt["prompt_ids"]) == prompt["prompt"]
    assert "reference answers: 1 from ####" in quiet.lines[0]


def test_prompts_without_a_reference_answer_keep_the_columns_of_the_data(tokenizer, quiet):
    rows = [{"prompt": "q", "tests": [{"stdin": "1", "stdout": "2"}]}, {"prompt": "r"}]
    prompts = load_prompts(rows, tokenizer, template="plain", say=quiet)
    assert prompts["tests"][:] == [[{"stdin": "1", "stdout": "2"}], None]
    assert prompts["prompt"][:] == ["q", "r"]
    assert "answer" not in prompts.column_names


RECORDED = [
    ({"question": "q", "answer": "3"}, "alpaca"),
    ({"question": "q", "answer": "3"}, "plain"),
    (ALPACA | {"input": "now"}, "alpaca"),
    (ALPACA | {"input": "now"}, "r1_zero"),
    ({"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]}, "plain"),
    ({"messages": [{"role": "user", "content": "q"}]}, "chat"),
    ({"prompt": "q"}, "chat"),
    (
        {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"},
        "plain",
    ),
]


@pytest.mark.parametrize(("row", "template"), RECORDED)
def test_a_record_of_the_source_prompt_is_trained_behind_the_very_prompt_that_was_answered(
    row, template, chat_tokenizer, quiet
):
    settings = {"template": template, "say": quiet}
    (prompt,) = load_prompts([row], chat_tokenizer, keep_source=True, **settings)
    source = json.loads(prompt["source_prompt"])
    completion = " 7" if isinstance(source, str) else [{"role": "assistant", "content": "7"}]
    record = {"prompt": source, "completion": completion}
    (document,) = load_documents([record], chat_tokenizer, **settings)
    length = len(prompt["prompt_ids"])
    assert document["input_ids"][:length] == prompt["prompt_ids"]
    assert document["trained"][: length + 1] == [False] * length + [True]


def test_the_source_of_a_prompt_is_kept_on_request_only(tokenizer, quiet):
    (prompt,) = load_prompts([{"question": "q", "answer": "3"}], tokenizer, say=quiet)
    assert "source_prompt" not in prompt


def test_a_prompt_function_serves_as_a_template(tokenizer, quiet):
    (prompt,) = load_prompts(
        [{"question": "1+1", "answer": "2"}],
        tokenizer,
        template=lambda example: f"Q: {example.instruction}\nA:",
        say=quiet,
    )
    assert prompt["prompt"] == "Q: 1+1\nA:"


def test_long_documents_are_cut_and_counted_and_dropped_without_a_target(tokenizer, quiet):
    rows = [
        {"prompt": "q", "completion": "fits"},
        {"prompt": "q", "completion": "is too long"},
        {"prompt": "a prompt of no use", "completion": "a"},
    ]
    documents = load_documents(rows, tokenizer, template="plain", max_length=8, say=quiet)
    assert [tokenizer.decode(ids) for ids in documents["input_ids"]] == ["qfits</s>", "qis too "]
    assert "dropped 1: 1 without a target within max_length (first: row 3)" in quiet.lines[0]
    assert "50.0% truncated" in quiet.lines[0]
    assert "max 20" in quiet.lines[0]  # before the limit


def test_long_pairs_and_prompts_are_dropped_and_counted(tokenizer, quiet):
    rows = [PAIR, PAIR | {"rejected": "much too long"}]
    pairs = load_pairs(rows, tokenizer, template="plain", max_length=9, say=quiet)
    assert len(pairs) == 1
    prompts = load_prompts(
        [{"prompt": "four"}, {"prompt": "five!"}],
        tokenizer,
        template="plain",
        max_prompt_length=4,
        say=quiet,
    )
    assert prompts["prompt"][:] == ["four"]
    summaries = [line for line in quiet.lines if "->" in line]
    assert "dropped 1: 1 longer than 9 tokens (first: row 2)" in summaries[0]
    assert "dropped 1: 1 longer than 4 tokens (first: row 2)" in summaries[1]


def test_pairs_that_share_no_prompt_or_do_not_differ_are_dropped_with_the_reason(tokenizer, quiet):
    start = "\n\nHuman: q\n\nAssistant:"
    rows = [
        {"chosen": start + " yes", "rejected": start + " no"},
        {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "Other: r"},
        {"chosen": start + " a\n\nHuman: r\n\nAssistant: b", "rejected": start + " c"},
        {"chosen": start + " same", "rejected": start + " same"},
    ]
    (pair,) = load_pairs(rows, tokenizer, say=quiet)
    assert tokenizer.decode(pair["prompt_ids"] + pair["chosen_ids"]) == start + " yes</s>"
    assert "dropped 3: 1 whose chosen and rejected share no prompt (first: row 2)" in quiet.lines[0]
    assert (
        "1 whose chosen and rejected part before the last answer (first: row 3)" in quiet.lines[0]
    )
    assert "1 whose chosen equals rejected (first: row 4)" in quiet.lines[0]


def test_a_few_empty_answers_are_dropped_and_counted_and_many_are_an_error(tokenizer, quiet):
    rows = [ALPACA] * 99 + [ALPACA | {"output": "  "}]
    assert len(load_documents(rows, tokenizer, say=quiet)) == 99
    assert "dropped 1: 1 with an empty answer (first: row 100)" in quiet.lines[0]
    with pytest.raises(DataError, match=r"2 of 51 rows come with an empty answer .first: .* row 1"):
        load_documents([ALPACA | {"output": ""}] * 2 + [ALPACA] * 49, tokenizer, say=quiet)


@pytest.mark.parametrize(
    "row",
    [PAIR | {"rejected": ""}, PAIR | {"prompt": " "}],
    ids=["answer", "prompt"],
)
def test_empty_answers_and_prompts_of_pairs_are_refused(tokenizer, row, quiet):
    with pytest.raises(DataError, match="1 of 1 rows come with an empty"):
        load_pairs([row], tokenizer, say=quiet)


def test_an_empty_reference_answer_is_refused(tokenizer, quiet):
    with pytest.raises(DataError, match="with an empty answer"):
        load_prompts([{"question": "q", "answer": " "}], tokenizer, say=quiet)


def test_conversations_without_an_answer_are_dropped_as_documents(tokenizer, quiet):
    question = {"messages": [{"role": "user", "content": "q"}]}
    documents = load_documents([question, FORMAT_ROWS[-1]], tokenizer, say=quiet)
    assert len(documents) == 1
    assert "dropped 1: 1 without an assistant turn" in quiet.lines[0]


def test_a_tokenizer_without_an_end_token_is_refused(make_tokenizer, quiet):
    with pytest.raises(DataError, match="no end-of-sequence token"):
        load_documents([ALPACA], make_tokenizer(eos=None), say=quiet)


def test_data_that_is_all_too_long_is_refused_with_its_lengths(tokenizer, quiet):
    with pytest.raises(DataError, match=r"none of 1 rows .*longest .* tokens; max_length=10"):
        load_documents([ALPACA], tokenizer, max_length=10, say=quiet)
    with pytest.raises(DataError, match="1 longer than 3 tokens"):
        load_pairs([PAIR], tokenizer, max_length=3, say=quiet)
    with pytest.raises(DataError, match="max_prompt_length=3"):
        load_prompts([PAIR], tokenizer, max_prompt_length=3, say=quiet)


def test_documents_that_are_all_cut_before_their_end_are_refused(tokenizer, quiet):
    rows = [{"prompt": "q", "completion": "long answer"}]
    with pytest.raises(DataError, match="could not learn to stop"):
        load_documents(rows, tokenizer, template="plain", max_length=5, say=quiet)


def test_a_column_of_mixed_types_is_named(tokenizer, quiet):
    rows = [{"prompt": "q", "level": 1}, {"prompt": "r", "level": "two"}]
    with pytest.raises(DataError, match="column 'level': its rows hold different types"):
        load_prompts(rows, tokenizer, say=quiet)


def test_human_eval_and_mbpp_are_judged_by_the_code_reward_as_they_are_loaded(tokenizer, quiet):
    human_eval = {
        "prompt": "import math\n\ndef root(x):\n    'Square root, rounded down.'\n",
        "test": "def check(candidate):\n    assert candidate(10) == 3 and candidate(0) == 0\n",
        "entry_point": "root",
    }
    mbpp = {
        "prompt": "Square root, rounded down.",
        "code": "def root(x): return int(x ** 0.5)",
        "test_list": ["assert math.floor(root(10)) == 3", "assert root(0) == 0"],
        "test_imports": ["import math"],
    }
    bodies = ["    return math.isqrt(x)\n", "    return 3\n"]
    whole = [mbpp["code"], "def root(x): return 3"]
    for row, completions in ((human_eval, bodies), (mbpp, whole)):
        prompts = load_prompts([row, row], tokenizer, template="plain", say=quiet)
        assert code_reward(completions, tests=prompts["tests"]) == [1.0, 0.0]
    assert prompts["prompt"][0].endswith("```python\nassert math.floor(root(10)) == 3\n```")


def test_a_file_gives_what_its_rows_give(tokenizer, write, quiet):
    from_file = load_pairs(write("pairs.jsonl", [PAIR, PAIR]), tokenizer, say=quiet)
    assert from_file[:] == load_pairs([PAIR, PAIR], tokenizer, say=quiet)[:]


def test_more_rows_than_a_block_keep_their_order(tokenizer, quiet):
    rows = [{"prompt": f"{number} "} for number in range(2500)]
    prompts = load_prompts(rows, tokenizer, template="plain", say=quiet)
    assert prompts["prompt"][:] == [row["prompt"] for row in rows]


def test_importing_the_package_loads_nothing_heavy():
    import subprocess

    heavy = {"torch", "transformers", "datasets", "pyarrow", "numpy", "rich"}
    code = f"import sys, posttrain.data; print(*{heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
