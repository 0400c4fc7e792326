"""Text to token ids, piece by piece: a prompt is never tokenised together with its answer.

So the ids that the model is prompted with are the ids it was trained on, whatever merges a
tokenizer would make across the boundary.
"""

from collections.abc import Sequence
from typing import Any

from posttrain.data.examples import Segment
from posttrain.data.marks import find_marking, without_marks
from posttrain.errors import DataError

WORD_START = "▁"  # how SentencePiece vocabularies write a space
BOUNDARY_CHARS = 32  # more than the longest tokens of white space and common words
MARK = "an-answer"  # text that no chat template writes by itself
CALL = {"type": "function", "id": "call00001", "function": {"name": MARK, "arguments": {}}}


class Encoder:
    """A tokenizer with its special tokens settled.

    Raises DataError for a tokenizer without an end-of-sequence token: no answer could ever end.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        if tokenizer.eos_token_id is None:
            raise DataError(
                "The tokenizer has no end-of-sequence token, so the model could not learn to stop. "
                "Set tokenizer.eos_token (usually it is named in the model's config)."
            )
        self.eos_id: int = tokenizer.eos_token_id
        self.end_ids = {self.eos_id} | turn_end_ids(tokenizer)
        bare = self._ids(["a"])[0]
        first_id = tokenizer("a", verbose=False)["input_ids"][0]
        self.bos = [first_id] if first_id == tokenizer.bos_token_id else []
        # Such tokenizers put a space before every text they are given. In the middle of a
        # sequence that space would be one too many.
        first = tokenizer.convert_ids_to_tokens(bare)[0] if bare else ""
        self.pads_with_space = str(first).startswith(WORD_START)

    def prompts(self, texts: Sequence[str], *, add_bos: bool) -> list[list[int]]:
        """Ids of texts that begin a sequence, with the tokenizer's own BOS once, if it adds one."""
        return [self._begun(ids) if add_bos else ids for ids in self._ids(texts)]

    def answers(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of texts that continue a prompt, each closed by an end-of-sequence token."""
        return [self.ended(ids) for ids in self.continuations(texts)]

    def continuations(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of texts in the middle of a sequence."""
        if not self.pads_with_space:
            return self._ids(texts)
        anchor, *anchored = self._ids(["\n", *("\n" + text for text in texts)])
        return [ids[len(anchor) :] for ids in anchored]

    def ended(self, ids: list[int]) -> list[int]:
        """Ids closed by EOS, unless they close with an end token (of a turn, say) already."""
        return ids if ids and ids[-1] in self.end_ids else [*ids, self.eos_id]

    def documents(
        self, documents: Sequence[list[Segment]], *, add_bos: bool
    ) -> list[tuple[list[int], list[bool]]]:
        """(ids, trained) of each document: the ids of its segments one after the other.

        The first token is never trained: nothing predicts it.
        """
        firsts = self.prompts([segments[0].text for segments in documents], add_bos=add_bos)
        rest = self.continuations([s.text for segments in documents for s in segments[1:]])
        remaining = iter(rest)
        encoded = []
        for segments, ids in zip(documents, firsts, strict=True):
            trained = [False] * len(ids)
            for segment in segments[1:]:
                piece = next(remaining)
                piece = self.ended(piece) if segment.ends else piece
                ids, trained = ids + piece, trained + [segment.trained] * len(piece)
            encoded.append((ids, [False, *trained[1:]]))
        return encoded

    def joins(self, boundaries: Sequence[tuple[str, str]]) -> list[bool]:
        """Whether prompt and answer of each pair, tokenised together, would share a token.

        Looked at are the BOUNDARY_CHARS characters on both sides: tokenised together they give
        other ids than apart.
        """
        lefts = [prompt[-BOUNDARY_CHARS:] for prompt, _ in boundaries]
        rights = [answer[:BOUNDARY_CHARS] for _, answer in boundaries]
        together = self._ids([left + right for left, right in zip(lefts, rights, strict=True)])
        apart = zip(self._ids(lefts), self.continuations(rights), strict=True)
        return [both != a + b for both, (a, b) in zip(together, apart, strict=True)]

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False)

    def _begun(self, ids: list[int]) -> list[int]:
        return ids if not self.bos or ids[:1] == self.bos else self.bos + ids

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        if not texts:
            return []
        # verbose: no notice about texts longer than the model; length is checked in load.py.
        return self.tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]


def turn_end_ids(tokenizer: Any) -> set[int]:
    """Special tokens that the chat template puts after an assistant's turn, if it has one.

    Those after an answer, and the last one after a tool call: others there are part of the call.
    Where a turn ends with what opens the next one, only a training template may say so.
    """
    if not getattr(tokenizer, "chat_template", None):
        return set()
    turns = {"content": MARK}, {"content": "", "tool_calls": [CALL]}
    after_text, after_call = (_special_after_mark(tokenizer, turn) for turn in turns)
    if not after_text:
        marked = find_marking(tokenizer, tokenizer.get_chat_template()).template
        options = {"chat_template": marked}
        after_text, after_call = (_special_after_mark(tokenizer, t, **options) for t in turns)
    return {*after_text, *after_call[-1:]}


def _special_after_mark(tokenizer: Any, answer: dict[str, Any], **options: Any) -> list[int]:
    import jinja2

    turns = [{"role": "user", "content": "a"}, {"role": "assistant", **answer}]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False, **options)
    except (jinja2.TemplateError, TypeError):  # a template that knows no calls, or wants more turns
        return []
    _, found, after = without_marks(text)[0].rpartition(MARK)
    ids = tokenizer(after, add_special_tokens=False)["input_ids"] if found else []
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return [i for i in ids if i in special]
