"""Chat templates: which tokens are trained, with generation marks, without, and when unknowable."""

import pytest

from posttrain.data import load_documents, load_pairs, load_prompts
from posttrain.data.encoding import Encoder
from posttrain.errors import DataError

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


def test_a_template_that_rewrites_earlier_turns_is_an_error_not_a_guess(make_tokenizer, quiet):
    tokenizer = make_tokenizer(chat_template=REWRITING)
    rows = [{"messages": CONVERSATION[:3]}, {"messages": CONVERSATION}]
    with pytest.raises(DataError, match=r"row 2: cannot tell which tokens .*\{% generation %\}"):
        load_documents(rows, tokenizer, say=quiet)
    (document,) = load_documents(rows[:1], tokenizer, say=quiet)
    assert trained_text(tokenizer, document) == "2<|im_end|>"


def test_what_the_generation_prompt_gives_is_not_trained_even_when_marked(make_tokenizer, quiet):
    """Else documents and prompts would part: "\\n" after "assistant" is given, not generated."""
    template = CHATML_WITH_HEADER_MARKED
    tokenizer = make_tokenizer(chat_template=template)
    (document,) = load_documents([{"messages": CONVERSATION}], tokenizer, say=quiet)
    assert trained_text(tokenizer, document) == "2<|im_end|> 4\n<|im_end|>"


def test_an_end_that_only_the_last_turn_renders_does_not_hide_the_turns_before(
    make_tokenizer, quiet
):
    template = (
        "{% for m in messages %}{{ m['role'] + ':' + m['content'] }}"
        "{{ '</s>' if loop.last else '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    )
    template = template.replace("if loop.last", "if loop.last and not add_generation_prompt")
    tokenizer = make_tokenizer(chat_template=template)
    (document,) = load_documents([{"messages": CONVERSATION}], tokenizer, say=quiet)
    assert trained_text(tokenizer, document) == "2<|im_end|> 4\n</s>"


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


def test_marks_that_miss_a_turn_are_an_error(make_tokenizer, quiet):
    template = (
        "{% for m in messages %}{% if loop.last %}"
        "{% generation %}{{ m['content'] }}{% endgeneration %}"
        "{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
    )
    with pytest.raises(DataError, match=r"marks 1 generations .* with 2 assistant turns"):
        load_documents(
            [{"messages": CONVERSATION}], make_tokenizer(chat_template=template), say=quiet
        )


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
