"""A Modelfile, which tells Ollama the prompt format and the ends of a model.

    Path("Modelfile").write_text(modelfile("model.gguf", tokenizer, render, stops))

Ollama renders prompts by Go templates, so the tokenizer's own format is tried with placeholders and
written down as it came out: a system turn, a question, an answer, and the same again for each turn.
What a chat template does beyond that, such as tools, is left out.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SYSTEM, PROMPT, RESPONSE = "{{ .System }}", "{{ .Prompt }}", "{{ .Response }}"
Turns = list[dict[str, str]]


def modelfile(
    weights: str,
    tokenizer: PreTrainedTokenizerBase,
    render: Callable[[Turns], str],
    stops: Iterable[str],
) -> str:
    """Return the text of a Modelfile.

    Args:
        weights: the GGUF file, as seen from the Modelfile.
        render: turns to the text of a prompt.
        stops: texts of the tokens that end an answer.
    """
    lines = [f"FROM ./{weights}", f'TEMPLATE """{go_template(tokenizer, render)}"""']
    lines += [f'PARAMETER stop "{stop}"' for stop in stops if stop]
    return "\n".join(lines) + "\n"


def go_template(tokenizer: PreTrainedTokenizerBase, render: Callable[[Turns], str]) -> str:
    """Return the prompt format as a Go template, without the token that llama.cpp puts first."""
    user = {"role": "user", "content": PROMPT}
    plain = render([user])
    text = plain
    if tokenizer.chat_template:
        text = _with_system(plain, render([{"role": "system", "content": SYSTEM}, user]))
    if tokenizer.bos_token:
        text = text.replace(tokenizer.bos_token, "")
    return text + RESPONSE + _end(tokenizer, user)


def _with_system(plain: str, with_system: str) -> str:
    """Join a prompt without and one with a system turn into one that asks for it."""
    if SYSTEM not in with_system:
        return plain
    pairs = zip(reversed(plain), reversed(with_system), strict=False)
    common = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
    before, after = plain[: len(plain) - common], plain[len(plain) - common :]
    system = with_system[: len(with_system) - common]
    return f"{{{{ if .System }}}}{system}{{{{ else }}}}{before}{{{{ end }}}}{after}"


def _end(tokenizer: PreTrainedTokenizerBase, user: dict[str, str]) -> str:
    """Return what follows an answer."""
    if not tokenizer.chat_template:
        return tokenizer.eos_token
    turns: Sequence[dict[str, str]] = [user, {"role": "assistant", "content": RESPONSE}]
    return tokenizer.apply_chat_template(turns, tokenize=False).rpartition(RESPONSE)[2]
