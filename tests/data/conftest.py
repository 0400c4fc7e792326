"""A tokenizer without merges (one token a byte), and chat templates with and without marks."""

import json

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from posttrain.errors import DataError

SPECIAL = ("<s>", "</s>", "<|im_start|>", "<|im_end|>")

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHATML_MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ m['content'] + '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def byte_tokenizer(*, adds_bos=False, chat_template=None, eos="</s>"):
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: place for place, letter in enumerate(letters)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    if adds_bos:
        bos = ("<s>", backend.token_to_id("<s>"))
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[bos]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token=eos, clean_up_tokenization_spaces=False
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def data_error(call, *arguments, **settings) -> str:
    """Message of the DataError that a call raises; empty if it raises none."""
    try:
        call(*arguments, **settings)
    except DataError as error:
        return str(error)
    return ""


@pytest.fixture(scope="session")
def make_tokenizer():
    return byte_tokenizer


@pytest.fixture(scope="session")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture(scope="session")
def bos_tokenizer():
    return byte_tokenizer(adds_bos=True)


@pytest.fixture(scope="session")
def chat_tokenizer():
    return byte_tokenizer(chat_template=CHATML)


@pytest.fixture(scope="session")
def marked_tokenizer():
    return byte_tokenizer(chat_template=CHATML_MARKED)


@pytest.fixture
def quiet():
    """A `say` that keeps the lines, for tests that read them and tests that want silence."""
    lines = []

    def say(line):
        lines.append(line)

    say.lines = lines
    return say


@pytest.fixture
def write(tmp_path):
    """Writes rows (as JSON lines) or text to a file in a fresh folder; returns its path."""

    def write_file(name, content):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not isinstance(content, str):
            content = "".join(json.dumps(row) + "\n" for row in content)
        path.write_text(content, encoding="utf-8")
        return path

    return write_file
