"""Chat templates: which tokens are trained, with generation marks, without, and when unknowable."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from posttrain.data import load_documents, load_pairs, load_prompts, marks
from posttrain.data.encode import Encoder
from posttrain.errors import DataError
from tests.data.conftest import CHATML, CHATML_MARKED

CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "1+1?"},
    {"role": "assistant", "content": "2"},
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": " 4\n"},
]
RENDERED = (
    "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n1+1?<|im_end|>\n"
    "<|im_start|>assistant\n2<|im_end|>\n<|im_start|>user\n2+2?<|im_end|>\n"
    "<|im_start|>assistant\n 4\n<|im_end|>"
)


def trained_text(tokenizer, document):
    pairs = zip(document["input_ids"], document["trained"], strict=True)
    return tokenizer.decode([token for token, trained in pairs if trained])


@pytest.mark.parametrize("which", ["chat_tokenizer", "marked_tokenizer"])
def test_each_assistant_turn_and_its_end_token_is_trained_and_nothing_else(request, which, quiet):
    tokenizer = request.getfixturevalue(which)
    (document,) = load_documents([{"messages": CONVERSATION}], tokenizer, say=quiet)
    assert trained_text(tokenizer, document) == "2<|im_end|> 4\n<|im_end|>"
    assert tokenizer.decode(document["input_ids"]) == RENDERED


@pytest.mark.parametrize("which", ["chat_tokenizer", "marked_tokenizer"])
def test_only_the_completion_is_trained_after_a_prompt_with_answers(request, which, quiet):
    tokenizer = request.getfixturevalue(which)
    row = {"prompt": CONVERSATION[:4], "completion": CONVERSATION[4:]}
    (document,) = load_documents([row], tokenizer, say=quiet)
    assert trained_text(tokenizer, document) == " 4\n<|im_end|>"


def test_an_end_token_outside_the_marks_is_trained_all_the_same(make_tokenizer, quiet):
    """Otherwise the model would never learn to end its turn."""
    template = (
        "{% for m in messages %}"
        "{%- if m['role'] == 'assistant' %}\n"
        "    {%- generation %}{{ m['content'] }}{% endgeneration %}\n"
        "{{- '<|im_end|>' }}"
        "{%- else %}{{ '[' + m['content'] + ']' }}{% endif %}"
        "{% endfor %}"
    )
    tokenizer = make_tokenizer(chat_template=template)
    (document,) = load_documents([{"messages": CONVERSATION}], tokenizer, say=quiet)
    assert trained_text(tokenizer, document) == "2<|im_end|> 4\n<|im_end|>"
    rendered = tokenizer.apply_chat_template(CONVERSATION, tokenize=False)
    assert tokenizer.decode(document["input_ids"]) == rendered


def test_marks_agree_with_the_mask_of_transformers(marked_tokenizer, quiet):
    (document,) = load_documents([{"messages": CONVERSATION}], marked_tokenizer, say=quiet)
    theirs = marked_tokenizer.apply_chat_template(
        CONVERSATION, return_dict=True, return_assistant_tokens_mask=True
    )
    length = len(document["input_ids"])  # ours stops after the last target
    assert document["input_ids"] == theirs["input_ids"][:length]
    assert document["trained"] == [bool(mark) for mark in theirs["assistant_masks"][:length]]
    assert not any(theirs["assistant_masks"][length:])


CHATML_WITH_HEADER_MARKED = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ '<|im_start|>assistant' }}"
    "{% generation %}{{ '\n' + m['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
REWRITING = (  # as reasoning templates do: what earlier answers hold depends on what follows
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{{ m['content'] if loop.last or m['role'] != 'assistant' else '...' }}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def test_a_template_that_rewrites_earlier_turns_gets_a_document_for_each(make_tokenizer, quiet):
    """Each answer behind the prompt that the model will see: in one document the first is gone."""
    tokenizer = make_tokenizer(chat_template=REWRITING)
    rows = [{"messages": CONVERSATION[:3]}, {"messages": CONVERSATION}]
    one, first, second = load_documents(rows, tokenizer, say=quiet)
    assert one == first
    assert trained_text(tokenizer, first) == "2<|im_end|>"
    assert trained_text(tokenizer, second) == " 4\n<|im_end|>"
    assert "<|im_start|>assistant\n...<|im_end|>" in tokenizer.decode(second["input_ids"])
    note = "1 made into several documents, since the chat template renders earlier turns otherwise"
    assert f"kept, but note: {note} (first: row 2)" in quiet.lines[0]


def test_a_prompt_that_its_answer_does_not_begin_with_is_an_error_with_the_row(
    make_tokenizer, quiet
):
    """The template opens a <think> block that the rendered answer does not have."""
    template = CHATML.replace("assistant\n' }}{% endif %}", "assistant\n<think>' }}{% endif %}")
    tokenizer = make_tokenizer(chat_template=template)
    good = {"role": "assistant", "content": "<think>so</think>2"}
    rows = [{"messages": [CONVERSATION[1], good]}, {"messages": CONVERSATION[1:3]}]
    expected = (
        r"row 2: the prompt is no prefix of prompt and answer at turn 2 .* gives '<think>' .*"
    )
    with pytest.raises(DataError, match=expected + r"renders the answer as '2<.*reasoning_content"):
        load_documents(rows, tokenizer, say=quiet)
    (document,) = load_documents(rows[:1], tokenizer, say=quiet)
    assert trained_text(tokenizer, document) == "so</think>2<|im_end|>"
    pair = {"prompt": [CONVERSATION[1]], "chosen": [good], "rejected": [CONVERSATION[2]]}
    with pytest.raises(DataError, match="row 1: the prompt is no prefix"):
        load_pairs([pair], tokenizer, say=quiet)


def test_what_the_generation_prompt_gives_is_not_trained_even_when_marked(make_tokenizer, quiet):
    """Else documents and prompts would part: "\\n" after "assistant" is given, not generated."""
    template = CHATML_WITH_HEADER_MARKED
    tokenizer = make_tokenizer(chat_template=template)
    (document,) = load_documents([{"messages": CONVERSATION}], tokenizer, say=quiet)
    assert trained_text(tokenizer, document) == "2<|im_end|> 4\n<|im_end|>"


def test_an_end_that_only_the_last_turn_renders_is_trained_in_every_turn(make_tokenizer, quiet):
    """It is what the model has to say at run time, whatever stands in the history later."""
    template = (
        "{% for m in messages %}{{ m['role'] + ':' + m['content'] }}"
        "{{ '</s>' if loop.last else '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    )
    template = template.replace("if loop.last", "if loop.last and not add_generation_prompt")
    tokenizer = make_tokenizer(chat_template=template)
    documents = load_documents([{"messages": CONVERSATION}], tokenizer, say=quiet)
    assert [trained_text(tokenizer, each) for each in documents] == ["2</s>", " 4\n</s>"]


def test_an_end_that_the_last_turn_adds_to_the_common_one_needs_no_second_document(
    make_tokenizer, quiet
):
    template = (
        "{% for m in messages %}{{ m['role'] + ':' + m['content'] + '<|im_end|>' }}{% endfor %}"
        "{{ 'assistant:' if add_generation_prompt else '</s>' }}"
    )
    tokenizer = make_tokenizer(chat_template=template)
    (document,) = load_documents([{"messages": CONVERSATION}], tokenizer, say=quiet)
    assert trained_text(tokenizer, document) == "2<|im_end|> 4\n<|im_end|></s>"


def test_a_template_that_leaves_out_the_answers_text_is_an_error(make_tokenizer, quiet):
    template = (
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }}{% else %}"
        "{{ '<|im_end|>' }}{% endif %}{% endfor %}"
    )
    with pytest.raises(DataError, match="renders nothing of the assistant's text"):
        load_documents(
            [{"messages": CONVERSATION[1:3]}], make_tokenizer(chat_template=template), say=quiet
        )


def test_a_mark_for_the_text_and_one_for_its_end_are_both_trained(make_tokenizer, quiet):
    template = (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}"
        "{% generation %}{{ m['content'] }}{% endgeneration %}{{ '|' }}"
        "{% generation %}{{ '<|im_end|>' }}{% endgeneration %}"
        "{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
    )
    tokenizer = make_tokenizer(chat_template=template)
    (document,) = load_documents([{"messages": CONVERSATION[1:3]}], tokenizer, say=quiet)
    assert trained_text(tokenizer, document) == "2<|im_end|>"


def test_all_the_tokens_that_close_a_turn_are_trained_where_later_turns_keep_them(
    make_tokenizer, quiet
):
    template = CHATML.replace("'<|im_end|>\n'", "'<|im_end|></s>'")
    tokenizer = make_tokenizer(chat_template=template)
    (document,) = load_documents([{"messages": CONVERSATION}], tokenizer, say=quiet)
    assert trained_text(tokenizer, document) == "2<|im_end|></s> 4\n<|im_end|></s>"


def test_a_training_template_that_renders_no_answer_behind_its_prompt_is_not_used(
    chat_tokenizer, quiet, monkeypatch
):
    other = CHATML_MARKED.replace("assistant\n' }}{% endif %}", "assistant: ' }}{% endif %}")
    monkeypatch.setattr(marks, "_trl_lookup", lambda: lambda _: other)
    (document,) = load_documents([{"messages": CONVERSATION}], chat_tokenizer, say=quiet)
    assert trained_text(chat_tokenizer, document) == "2<|im_end|> 4\n<|im_end|>"
    assert "2 by what it adds to its prompt" in quiet.lines[0]


def test_marks_of_which_only_the_last_turn_has_some_still_train_every_turn(make_tokenizer, quiet):
    template = (
        "{% for m in messages %}{% if loop.last %}"
        "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}"
        "{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{% endfor %}"
    )
    tokenizer = make_tokenizer(chat_template=template)
    (document,) = load_documents([{"messages": CONVERSATION}], tokenizer, say=quiet)
    assert trained_text(tokenizer, document) == "2<|im_end|> 4\n<|im_end|>"


def test_marks_that_miss_an_answer_are_an_error(make_tokenizer, quiet):
    template = (
        "{% for m in messages %}{% if m['role'] == 'user' %}"
        "{% generation %}{{ m['content'] }}{% endgeneration %}"
        "{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
    )
    with pytest.raises(DataError, match=r"row 1: the marks of the chat template .* turn 3"):
        load_documents(
            [{"messages": CONVERSATION}], make_tokenizer(chat_template=template), say=quiet
        )


def test_the_summary_says_what_told_the_targets(chat_tokenizer, marked_tokenizer, quiet):
    for tokenizer in (chat_tokenizer, marked_tokenizer):
        load_documents([{"messages": CONVERSATION}], tokenizer, say=quiet)
    summaries = [line for line in quiet.lines if "->" in line]
    assert "assistant turns found: 2 by what it adds to its prompt;" in summaries[0]
    assert "assistant turns found: 2 by the chat template's marks;" in summaries[1]


@pytest.mark.parametrize("role", ["system", "user"])
def test_a_template_that_leaves_out_a_turn_is_an_error(make_tokenizer, role, quiet):
    template = CHATML.replace("in messages %}", "in messages if m['role'] != '" + role + "' %}")
    with pytest.raises(DataError, match=rf"row 1: the chat template leaves out turn \d \({role}\)"):
        load_documents(
            [{"messages": CONVERSATION}], make_tokenizer(chat_template=template), say=quiet
        )


def test_white_space_and_json_quoting_do_not_make_a_turn_count_as_left_out(make_tokenizer, quiet):
    template = CHATML.replace("m['content'] +", "m['content'].replace('\n', ' ') +")
    turns = [{"role": "user", "content": 'two\nlines "quoted"'}, CONVERSATION[2]]
    for each in (template, CHATML.replace("m['content'] +", "(m['content'] | tojson) +")):
        tokenizer = make_tokenizer(chat_template=each)
        assert len(load_documents([{"messages": turns}], tokenizer, say=quiet)) == 1


def test_conversations_with_reasoning_that_the_template_leaves_out_are_counted(
    chat_tokenizer, tokenizer, quiet
):
    """Each once, however many turns hold reasoning."""
    thoughtful = {"role": "assistant", "content": "2", "reasoning_content": "One and one."}
    turns = [CONVERSATION[1], thoughtful]
    rows = [{"messages": CONVERSATION[1:3]}, {"messages": turns + turns}, {"messages": turns}]
    for each in (chat_tokenizer, tokenizer):
        load_documents(rows, each, say=quiet)
    for line in quiet.lines[::2]:
        assert "2 with reasoning that the template leaves out (first: row 2)" in line


def test_a_think_block_that_the_template_leaves_out_is_counted(make_tokenizer, quiet):
    template = CHATML.replace("m['content'] +", "m['content'].split('</think>')[-1] +")
    answer = {"role": "assistant", "content": "<think>One and one.</think>2"}
    rows = [{"messages": [CONVERSATION[1], answer]}]
    load_documents(rows, make_tokenizer(chat_template=template), say=quiet)
    load_documents(rows, make_tokenizer(chat_template=CHATML), say=quiet)
    assert "1 with reasoning that the template leaves out" in quiet.lines[0]
    assert "reasoning" not in quiet.lines[2]


def test_variables_of_the_chat_template_come_from_the_row(make_tokenizer, quiet):
    template = "{{ mood }}" + CHATML
    row = {"messages": CONVERSATION[1:3], "chat_template_kwargs": {"mood": "calm"}}
    (document,) = load_documents([row], make_tokenizer(chat_template=template), say=quiet)
    tokenizer = make_tokenizer(chat_template=template)
    assert tokenizer.decode(document["input_ids"]).startswith("calm<|im_start|>user")
    for wrong, message in [("calm", "is text"), ({"tokenize": True}, "may not set tokenize")]:
        with pytest.raises(DataError, match=f"row 1: 'chat_template_kwargs' {message}"):
            load_documents([row | {"chat_template_kwargs": wrong}], tokenizer, say=quiet)


def joining_tokenizer():
    vocabulary = {token: place for place, token in enumerate(["a", "b", "Ċ", "ĊĊ", "</s>"])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[("Ċ", "Ċ")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")


def test_a_conversation_of_which_two_answers_would_share_tokens_counts_once(quiet):
    tokenizer = joining_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    turns = [("user", "a\n"), ("assistant", "\nb</s>"), ("user", "a\n"), ("assistant", "\na")]
    row = {"messages": [{"role": role, "content": content} for role, content in turns]}
    load_documents([row], tokenizer, say=quiet)
    assert "1 whose prompt, tokenised together" in quiet.lines[0]


def test_what_follows_an_answer_is_kept_apart_by_its_end_token(quiet):
    turns = [("user", "a"), ("assistant", "b\n"), ("user", "a"), ("assistant", "b")]
    row = {"messages": [{"role": role, "content": content} for role, content in turns]}
    load_documents([row], joining_tokenizer(), say=quiet)
    assert "kept, but note" not in quiet.lines[0]


@pytest.mark.parametrize(("content", "noted"), [("b", False), ("\nb", True)])
def test_a_prompt_that_would_share_a_token_with_its_answer_is_named_and_kept_apart(
    content, noted, quiet
):
    """The tokenizer has a token for two newlines; the prompt ends in one."""
    tokenizer = joining_tokenizer()
    row = {"prompt": "a\n", "completion": content}
    (document,) = load_documents([row], tokenizer, template="plain", say=quiet)
    ids = [tokenizer.convert_tokens_to_ids(each) for each in "aĊ" + content.replace("\n", "Ċ")[:1]]
    assert document["input_ids"][: len(ids)] == ids
    assert document["trained"][:3] == [False, False, True]
    assert ("whose prompt, tokenised together with its answer" in quiet.lines[0]) == noted
    together = tokenizer(row["prompt"] + content)["input_ids"]
    assert (together != document["input_ids"][:-1]) == noted


def test_a_template_without_any_end_token_gets_the_tokenizers_own(make_tokenizer, quiet):
    template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    tokenizer = make_tokenizer(chat_template=template)
    (document,) = load_documents([{"messages": CONVERSATION[:3]}], tokenizer, say=quiet)
    assert document["input_ids"][-1] == tokenizer.eos_token_id
    assert document["trained"][-1]


def test_a_template_that_refuses_the_turns_is_an_error_with_the_row(make_tokenizer, quiet):
    template = (
        "{% for m in messages %}{% if m['role'] == 'system' %}"
        "{{ raise_exception('no system role') }}{% endif %}{{ m['content'] }}{% endfor %}"
    )
    with pytest.raises(
        DataError, match=r"row 1: .* refuses the turns system, user.*no system role"
    ):
        load_documents(
            [{"messages": CONVERSATION}], make_tokenizer(chat_template=template), say=quiet
        )


@pytest.mark.parametrize("which", ["chat_tokenizer", "marked_tokenizer"])
def test_pairs_and_prompts_agree_with_documents_on_every_id(request, which, quiet):
    """Prompt ids + chosen ids of a pair are the ids of the document that holds both."""
    tokenizer = request.getfixturevalue(which)
    other = [*CONVERSATION[:4], {"role": "assistant", "content": "5"}]
    (pair,) = load_pairs([{"chosen": CONVERSATION, "rejected": other}], tokenizer, say=quiet)
    (document,) = load_documents([{"messages": CONVERSATION}], tokenizer, say=quiet)
    (prompt,) = load_prompts([{"messages": CONVERSATION}], tokenizer, template="chat", say=quiet)
    assert pair["prompt_ids"] + pair["chosen_ids"] == document["input_ids"]
    assert prompt["prompt_ids"] == pair["prompt_ids"]
    assert tokenizer.decode(pair["rejected_ids"]) == "5<|im_end|>"


def test_the_paired_input_follows_the_instruction(chat_tokenizer, quiet):
    row = {"instruction": "Add.", "input": "1 2", "output": "3"}
    (document,) = load_documents([row], chat_tokenizer, say=quiet)
    assert "user\nAdd.\n\n1 2<|im_end|>" in chat_tokenizer.decode(document["input_ids"])


def test_dialogues_become_turns_of_the_chat_template(chat_tokenizer, quiet):
    prompt = "\n\nHuman: q\n\nAssistant: a\n\nHuman: r\n\nHuman: s\n\nAssistant:"
    row = {"chosen": prompt + " yes", "rejected": prompt + " no"}
    (pair,) = load_pairs([row], chat_tokenizer, say=quiet)
    assert chat_tokenizer.decode(pair["prompt_ids"]) == (
        "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n"
        "<|im_start|>user\nr\n\ns<|im_end|>\n<|im_start|>assistant\n"
    )
    assert chat_tokenizer.decode(pair["chosen_ids"]) == "yes<|im_end|>"


def test_an_answer_ends_with_eos_or_what_the_template_closes_a_turn_with(chat_tokenizer, tokenizer):
    """Other special tokens, such as those that open a turn, end nothing."""
    ids = chat_tokenizer.convert_tokens_to_ids
    assert Encoder(chat_tokenizer).end_ids == {chat_tokenizer.eos_token_id, ids("<|im_end|>")}
    assert Encoder(tokenizer).end_ids == {tokenizer.eos_token_id}
