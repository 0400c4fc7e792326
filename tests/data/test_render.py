"""Prompt templates: the published ones to the letter, the rest by what they must hold."""

import hashlib

import pytest

from posttrain.data.example import Example, assistant, user
from posttrain.data.formats import FORMATS
from posttrain.data.render import (
    ALPACA_WITH_INPUT,
    ALPACA_WITHOUT_INPUT,
    TEMPLATES,
    alpaca_prompt,
    choose_template,
    plain_prompt,
    r1_zero_prompt,
    r1_zero_think_prompt,
)
from posttrain.errors import ConfigError, DataError

FORMAT = {entry.name: entry for entry in FORMATS}
QUESTION = Example("a.jsonl, row 1", (user("q"),), (assistant("a"),), texts=("q", "a"))


@pytest.mark.parametrize(
    ("template", "sha256", "chars", "newlines"),
    [
        (
            ALPACA_WITH_INPUT,
            "28811e9850d9511bab334d167a03a8a37614535fdb28d645492efac8e9951c0f",
            224,
            8,
        ),
        (
            ALPACA_WITHOUT_INPUT,
            "35101bc36d10997c7d926d8f21f7d173aec6523f3a57d78821b944a89925cdca",
            152,
            5,
        ),
    ],
)
def test_alpaca_templates_are_those_of_stanford_to_the_letter(template, sha256, chars, newlines):
    """Golden case alpaca_prompt_template_hash."""
    assert hashlib.sha256(template.encode()).hexdigest() == sha256
    assert (len(template), template.count("\n")) == (chars, newlines)


def test_alpaca_prompt_with_and_without_input():
    with_input = Example("", (user("{add}"),), input="1 {2}")
    assert alpaca_prompt(with_input).endswith("{add}\n\n### Input:\n1 {2}\n\n### Response:")
    assert alpaca_prompt(QUESTION).endswith("### Instruction:\nq\n\n### Response:")


def test_r1_zero_prompt_asks_for_both_parts_and_ends_where_the_assistant_begins():
    prompt = r1_zero_prompt(QUESTION)
    assert prompt.endswith("User: q\nAssistant:")
    for tag in ("<think>", "</think>", "<answer>", "</answer>"):
        assert tag in prompt
    assert r1_zero_think_prompt(QUESTION) == prompt + " <think>"


@pytest.mark.parametrize("name", TEMPLATES)
def test_no_template_ends_in_white_space(name):
    prompt = TEMPLATES[name](QUESTION)
    assert prompt == prompt.rstrip()


def test_plain_keeps_texts_and_writes_messages_as_a_dialogue():
    assert plain_prompt(QUESTION) == "q"
    turns = (user("q"), assistant("a"), user("r"))
    expected = "\n\nHuman: q\n\nAssistant: a\n\nHuman: r\n\nAssistant:"
    assert plain_prompt(Example("", turns)) == expected


def test_a_system_text_comes_before_the_question():
    example = Example("", ({"role": "system", "content": "s"}, user("q")))
    assert "### Instruction:\ns\n\nq\n\n### Response:" in alpaca_prompt(example)


def test_a_template_for_one_question_refuses_a_conversation():
    example = Example("a.jsonl, row 9", (user("q"), assistant("a"), user("r")))
    with pytest.raises(DataError, match=r"row 9: the prompt is a conversation .user, assistant"):
        alpaca_prompt(example)


@pytest.mark.parametrize(
    ("format_name", "with_chat", "without_chat"),
    [
        ("Alpaca", "chat", "alpaca"),
        ("prompt/completion", "chat", "alpaca"),
        ("preference", "chat", "alpaca"),
        ("dialogue pairs", "chat", "plain"),
        ("messages", "chat", "plain"),
        ("text", "plain", "plain"),
    ],
)
def test_auto_takes_the_chat_template_else_what_suits_the_format(
    tokenizer, chat_tokenizer, format_name, with_chat, without_chat
):
    entry = FORMAT[format_name]
    assert choose_template("auto", chat_tokenizer, entry, default="alpaca").name == with_chat
    assert choose_template("auto", tokenizer, entry, default="alpaca").name == without_chat


@pytest.mark.parametrize(
    ("template", "format_name", "message"),
    [
        ("alpacca", "Alpaca", "unknown name 'alpacca'; known: auto, chat.*Did you mean 'alpaca'"),
        ("chat", "Alpaca", "has no chat template"),
        ("alpaca", "text", "no prompt to put into a template"),
    ],
)
def test_a_template_that_cannot_be_used_is_a_config_error(
    tokenizer, template, format_name, message
):
    with pytest.raises(ConfigError, match=message):
        choose_template(template, tokenizer, FORMAT[format_name], default="alpaca")
