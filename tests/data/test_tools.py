"""Tools: schemas, calls and results in conversations, whichever way the file writes them."""

import json

import pytest

from posttrain.data import load_documents, load_pairs, load_prompts, read_records
from posttrain.data.encode import Encoder
from posttrain.data.formats import DOCUMENTS, detect_format, parse_row
from posttrain.errors import DataError

TOOL_TEMPLATE = (
    "{% if tools %}{{ '<|im_start|>tools\n' + (tools | tojson) + '<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}"
    "{% for c in m.tool_calls or [] %}"
    "{{ 'call ' + c.function.name + ' ' + (c.function.arguments | tojson) }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
USER = {"role": "user", "content": "1+2?"}
CALLED = {"name": "add", "arguments": {"a": 1, "b": None}}
RESULT = {"role": "tool", "name": "add", "content": "3"}
ANSWER = {"role": "assistant", "content": "It is 3."}


def calling(calls, **others):
    return {"role": "assistant", "content": None, "tool_calls": calls, **others}


def row_with(calls, **others):
    return {"messages": [USER, calling(calls), RESULT, ANSWER], "tools": TOOLS, **others}


def example_of(row, source=None):
    records = read_records(source or [row])
    entry = detect_format(records, DOCUMENTS)
    ((example,),) = [parse_row(entry, each) for each in records]
    return example


def trained_text(tokenizer, document):
    pairs = zip(document["input_ids"], document["trained"], strict=True)
    return tokenizer.decode([token for token, is_trained in pairs if is_trained])


@pytest.fixture(scope="module")
def tool_tokenizer(make_tokenizer):
    return make_tokenizer(chat_template=TOOL_TEMPLATE)


def test_calls_are_trained_and_results_are_not(tool_tokenizer, quiet):
    (document,) = load_documents([row_with([{"function": CALLED}])], tool_tokenizer, say=quiet)
    assert trained_text(tool_tokenizer, document) == 'call add {"a": 1}<|im_end|>It is 3.<|im_end|>'
    text = tool_tokenizer.decode(document["input_ids"])
    assert text.startswith('<|im_start|>tools\n[{"type": "function"')
    assert "<|im_start|>tool\n3<|im_end|>" in text


@pytest.mark.parametrize(
    "calls",
    [
        [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}],
        [{"function": {"name": "add", "arguments": '{"a": 1}'}}],
        [{"name": "add", "arguments": {"a": 1}}],
        [{"name": "add", "parameters": {"a": 1}}],
        '[{"name": "add", "arguments": {"a": 1}}]',
    ],
    ids=["nested", "arguments as text", "flat", "parameters", "all as text"],
)
def test_calls_are_read_in_every_way_they_are_written(calls):
    turn = example_of(row_with(calls)).turns[1]
    assert turn["tool_calls"] == [
        {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    ]


def test_the_id_of_a_call_is_kept_and_absent_arguments_are_none():
    (call,) = example_of(row_with([{"id": "x1", "function": {"name": "add"}}])).turns[1][
        "tool_calls"
    ]
    assert (call["id"], call["function"]["arguments"]) == ("x1", {})


def test_nothing_is_a_value_in_json_and_absent_elsewhere(write):
    """Arrow fills each object with the keys of all others; a JSON file holds what was written."""
    row = row_with([{"function": CALLED}])
    from_file = example_of(None, write("a.jsonl", [row])).turns[1]["tool_calls"][0]["function"]
    in_memory = example_of(row).turns[1]["tool_calls"][0]["function"]
    assert (from_file["arguments"], in_memory["arguments"]) == ({"a": 1, "b": None}, {"a": 1})


def test_tools_may_be_json_text():
    assert example_of(row_with([CALLED]) | {"tools": json.dumps(TOOLS)}).tools == TOOLS
    assert example_of(row_with([CALLED]) | {"tools": "[]"}).tools is None


def test_sharegpt_calls_results_and_system_column_become_turns():
    conversation = [
        {"from": "human", "value": "1+2?"},
        {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
        {"from": "observation", "value": "3"},
        {"from": "gpt", "value": "It is 3."},
    ]
    example = example_of({"conversations": conversation, "system": "Be brief.", "tools": TOOLS})
    assert [turn["role"] for turn in example.turns] == ["system", "user", "assistant", "tool"]
    assert example.turns[2]["tool_calls"][0]["function"]["name"] == "add"
    assert example.tools == TOOLS
    own = [{"from": "system", "value": "Own."}, *conversation]
    turns = example_of({"conversations": own, "system": "Be brief."}).turns
    assert [turn["content"] for turn in turns[:2]] == ["Own.", "1+2?"]


def test_pairs_and_prompts_have_the_tools_in_their_prompt(tool_tokenizer, quiet):
    pair = {"prompt": [USER], "chosen": [calling([CALLED])], "rejected": [ANSWER], "tools": TOOLS}
    (pair,) = load_pairs([pair], tool_tokenizer, say=quiet)
    rows = [{"prompt": [USER], "tools": TOOLS}, {"prompt": "1+2?", "tools": TOOLS}]
    prompts = load_prompts(rows, tool_tokenizer, template="chat", say=quiet)
    assert prompts[0]["prompt_ids"] == prompts[1]["prompt_ids"] == pair["prompt_ids"]
    assert '"name": "add"' in prompts[0]["prompt"]
    assert tool_tokenizer.decode(pair["chosen_ids"]) == 'call add {"a": 1}<|im_end|>'


def test_a_column_of_that_name_beside_texts_may_hold_something_else(tokenizer, quiet):
    rows = [{"prompt": "Cut it.", "tools": ["saw"]}]
    (prompt,) = load_prompts(rows, tokenizer, template="plain", say=quiet)
    assert prompt["tools"] == ["saw"]


@pytest.mark.parametrize(
    ("row", "what"),
    [(row_with([CALLED]), "tool calls"), ({"messages": [USER, ANSWER], "tools": TOOLS}, "tools")],
)
def test_templates_of_text_refuse_tools(tokenizer, row, what, quiet):
    with pytest.raises(
        DataError, match=f"row 1: the row has {what}, for which the template 'plain'"
    ):
        load_documents([row], tokenizer, say=quiet)


def test_a_prompt_function_may_write_the_tools_itself(tokenizer, quiet):
    (prompt,) = load_prompts(
        [{"prompt": [USER], "tools": TOOLS}],
        tokenizer,
        template=lambda example: f"{example.tools[0]['function']['name']}: {example.instruction}",
        say=quiet,
    )
    assert prompt["prompt"] == "add: 1+2?"


@pytest.mark.parametrize(
    ("drops", "lost"),
    [
        ("(tools | tojson)", "the column tools"),
        ("'call ' + c.function.name + ' ' + (c.function.arguments | tojson)", "the call of 'add'"),
        ("m['content']", r"turn \d \(\w+\)"),
    ],
)
def test_a_template_that_leaves_out_tools_calls_or_results_is_an_error(
    make_tokenizer, drops, lost, quiet
):
    template = TOOL_TEMPLATE.replace(drops, "'-'")
    if drops == "m['content']":
        template = TOOL_TEMPLATE.replace(drops, "('-' if m['role'] == 'tool' else m['content'])")
    with pytest.raises(DataError, match=f"row 1: the chat template leaves out {lost}"):
        load_documents([row_with([CALLED])], make_tokenizer(chat_template=template), say=quiet)


def test_a_prompt_function_cannot_write_the_calls_of_an_answer(tokenizer, quiet):
    row = {"prompt": [USER], "completion": [calling([CALLED])]}
    with pytest.raises(DataError, match="row 1: the row has tool calls"):
        load_documents([row], tokenizer, template=lambda _: "q", say=quiet)


def test_a_document_of_text_has_nothing_to_do_with_tools(tokenizer, quiet):
    assert len(load_documents([{"text": "ab", "tools": TOOLS}], tokenizer, say=quiet)) == 1


def test_an_empty_result_is_a_result(tool_tokenizer, quiet):
    turns = [USER, calling([CALLED]), RESULT | {"content": ""}, ANSWER]
    (document,) = load_documents([{"messages": turns}], tool_tokenizer, say=quiet)
    assert "tool\n<|im_end|>" in tool_tokenizer.decode(document["input_ids"])


CALL_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}"
    "{% if m.tool_calls %}{{ m.tool_calls[0].function.name + '<|im_start|>' }}{% endif %}"
    "{% endgeneration %}{{ '<|im_end|>' }}"
    "{% else %}{{ m['content'] + ' ' }}{% endif %}{% endfor %}"
)


def test_the_end_of_a_call_is_trained_also_when_marks_stop_before_it(make_tokenizer, quiet):
    tokenizer = make_tokenizer(chat_template=CALL_TEMPLATE)
    (document,) = load_documents([row_with([CALLED]) | {"tools": None}], tokenizer, say=quiet)
    assert trained_text(tokenizer, document) == "add<|im_start|><|im_end|>It is 3.<|im_end|>"


def test_a_call_without_its_end_in_later_turns_has_a_document_of_its_own(make_tokenizer, quiet):
    """So that its end is trained: the token before it is part of the call."""
    template = CALL_TEMPLATE.replace(
        "{{ '<|im_end|>' }}",
        "{{ '<|im_end|>' if not m.tool_calls or (loop.last and not add_generation_prompt) }}",
    )
    tokenizer = make_tokenizer(chat_template=template)
    documents = load_documents([row_with([CALLED]) | {"tools": None}], tokenizer, say=quiet)
    trained = [trained_text(tokenizer, document) for document in documents]
    assert trained == ["add<|im_start|><|im_end|>", "It is 3.<|im_end|>"]


def test_a_prompt_that_leaves_out_earlier_calls_is_an_error_though_the_tools_name_them(
    make_tokenizer, quiet
):
    tokenizer = make_tokenizer(chat_template=TOOL_TEMPLATE.replace("or [] %}", "and [] %}"))
    row = {"prompt": row_with([CALLED])["messages"][:3], "tools": TOOLS}
    with pytest.raises(DataError, match="row 1: the chat template leaves out the calls of tools"):
        load_prompts([row], tokenizer, template="chat", say=quiet)


def test_a_call_whose_name_only_the_text_holds_is_left_out(make_tokenizer, quiet):
    tokenizer = make_tokenizer(chat_template=TOOL_TEMPLATE.replace("or [] %}", "and [] %}"))
    row = {"messages": [USER, calling([CALLED], content="I add.")], "tools": TOOLS}
    with pytest.raises(DataError, match="leaves out the call of 'add' in turn 2"):
        load_documents([row], tokenizer, say=quiet)


def test_what_closes_a_tool_call_ends_an_answer_too(make_tokenizer):
    """gpt-oss ends calls with a token of their own; a token within the call ends nothing."""
    template = (
        "{% for m in messages %}{% if m.tool_calls %}"
        "{{ m.tool_calls[0].function.name + '<|im_start|><s>' }}"
        "{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{% endfor %}"
    )
    tokenizer = make_tokenizer(chat_template=template)
    ids = tokenizer.convert_tokens_to_ids
    assert Encoder(tokenizer).end_ids == {tokenizer.eos_token_id, ids("<|im_end|>"), ids("<s>")}
