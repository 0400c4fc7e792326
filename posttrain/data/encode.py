"""Text to token ids, and token ids to a dataset.

    encoder = Encoder(tokenizer)
    (ids,) = encoder.prompts(["Why?"], add_bos=True)
    (answer,) = encoder.answers([" So."])

A prompt is never tokenised together with its completion. So the ids that the model is prompted with
are the ids it was trained on, whatever merges a tokenizer would make across the boundary.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from posttrain.data.example import Example, Message, Segment, with_texts
from posttrain.data.marks import turn_end_ids
from posttrain.errors import DataError

if TYPE_CHECKING:
    import numpy
    import pyarrow
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

Truncation = Literal["keep_start", "keep_end", "drop"]
Document = tuple[list[int], list[bool]]  # token ids, and whether each is trained
WORD_START = "▁"  # how SentencePiece vocabularies write a space
BOUNDARY_CHARS = 16  # longer than a token that begins in one text and ends in the next
# What a column of a dataset holds: token ids (int32), a flag for each, one flag, one number, or
# what the data has there, of which Arrow finds the type.
Kind = Literal["ids", "flags", "flag", "number", "images", "any"]
BATCH_ROWS = 1024  # of a dataset that is made, held as Python objects until then
# Stands in a control token that is only text. Unicode keeps this number out of texts, unlike those
# for private use, which fonts of icons have taken.
SPELLED = "\ufdd0"
# Control tokens that an assistant writes itself: tags of its reasoning, answers and calls.
OF_ASSISTANTS = re.compile("think|thought|reason|answer|solution|tool|call", re.IGNORECASE)


class Encoder:
    """A tokenizer with its special tokens settled.

    Raises DataError for a tokenizer without an end-of-sequence token: no completion could ever end.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        if tokenizer.eos_token_id is None:
            raise DataError(
                "The tokenizer has no end-of-sequence token, so the model could not learn to stop. "
                "Set tokenizer.eos_token (usually it is named in the model's config)."
            )
        self.eos_id: int = tokenizer.eos_token_id
        self.end_ids = {self.eos_id}
        if getattr(tokenizer, "chat_template", None):
            self.end_ids |= turn_end_ids(tokenizer)
        self.control = control_tokens(tokenizer)
        self.is_plain = _is_plain(tokenizer)
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

    def documents(self, documents: Sequence[list[Segment]], *, add_bos: bool) -> list[Document]:
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
        """True for each (prompt, answer) that would share a token if tokenised together.

        Only the BOUNDARY_CHARS characters on both sides are tokenised: together they do not begin
        with the ids of the prompt's.
        """
        lefts = [prompt[-BOUNDARY_CHARS:] for prompt, _ in boundaries]
        ends = dict.fromkeys(lefts)  # few, where a template closes the prompts
        ends = dict(zip(ends, self._ids(list(ends)), strict=True))
        rights = [answer[:BOUNDARY_CHARS] for _, answer in boundaries]
        together = self._ids([left + right for left, right in zip(lefts, rights, strict=True)])
        apart = map(ends.__getitem__, lefts)
        return [both[: len(a)] != a for both, a in zip(together, apart, strict=True)]

    def as_text(self, example: Example) -> Example:
        """The example with its control tokens kept text: only a template's are control tokens.

        Each that a text spells out is marked, for the methods above to tokenise it as other text.
        The tags of reasoning, answers and calls in an assistant's turn stay tokens, and an end
        token that closes the turn goes: the template writes it. The same object without any.
        """
        if not any(map(self.control.search, example.all_texts)):
            return example
        unclosed = replace(
            example,
            turns=tuple(map(self._unclosed, example.turns)),
            answers=tuple(map(self._unclosed, example.answers)),
        )
        return with_texts(
            unclosed,
            lambda text, role: self.control.sub(lambda found: _spelled(found.group(), role), text),
        )

    def _unclosed(self, turn: Message) -> Message:
        """An assistant's turn without the end tokens that close its text."""
        if turn["role"] != "assistant":
            return turn
        ends, text = self.tokenizer.convert_ids_to_tokens(sorted(self.end_ids)), turn["content"]
        while closing := next(filter(text.rstrip().endswith, ends), None):
            text = text.rstrip()[: -len(closing)]
        return {**turn, "content": text}

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids, special tokens included."""
        return self.tokenizer.decode(ids, skip_special_tokens=False)

    def _begun(self, ids: list[int]) -> list[int]:
        return ids if not self.bos or ids[:1] == self.bos else self.bos + ids

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text; control tokens that are marked as SPELLED become text."""
        ids = self._tokenise([text.replace(SPELLED, "") for text in texts])
        for place, text in enumerate(texts):
            if SPELLED in text:
                ids[place] = self._with_spelled(text)
        return ids

    def _with_spelled(self, text: str) -> list[int]:
        """Ids of a text with marks: cut at its true control tokens, as tokenizers cut it too."""
        pieces = re.split(f"({self.control.pattern})", text)  # text, token, text, … text
        added = {str(token): token for token in self.tokenizer.added_tokens_decoder.values()}
        ids, plain = [], ""
        for place in range(0, len(pieces), 2):
            before, piece, after = ["", *pieces, ""][place : place + 3]
            if SPELLED in piece:
                piece = piece.replace(SPELLED, "")
                piece = piece.lstrip() if before and added[before].rstrip else piece
                piece = piece.rstrip() if after and added[after].lstrip else piece
                anchor = "\n" if before and self.pads_with_space else ""
                anchored = self._tokenise([anchor + piece, anchor], split_special_tokens=True)
                ids += self._tokenise([plain])[0] + anchored[0][len(anchored[1]) :]
                plain = after
            else:
                plain += piece + after
        return ids + self._tokenise([plain])[0]

    def _tokenise(self, texts: Sequence[str], **settings: bool) -> list[list[int]]:
        if not texts:
            return []
        if self.is_plain and not settings:
            return self._plain_ids(texts)
        # verbose: no notice about texts longer than the model; the loader has its own limit.
        settings |= {"add_special_tokens": False, "verbose": False, "return_attention_mask": False}
        return self.tokenizer(list(texts), **settings)["input_ids"]

    def _plain_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """The tokenizer's ids, without what it finds besides: offsets, masks and types.

        They take a third of its time, and more to hand over.
        """
        backend = self.tokenizer.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = self.tokenizer.split_special_tokens
        found = backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in found]


def _is_plain(tokenizer: PreTrainedTokenizerBase) -> bool:
    """True for a fast tokenizer of which no subclass has another way from texts to ids."""
    from transformers import PreTrainedTokenizerFast

    ways = ("__call__", "_encode_plus")
    own, plain = (
        [getattr(kind, way, None) for way in ways]
        for kind in (type(tokenizer), PreTrainedTokenizerFast)
    )
    return own == plain


def without_spelling_marks(text: str) -> str:
    """The text without the marks of `Encoder.as_text`."""
    return text.replace(SPELLED, "")


def _spelled(token: str, role: str) -> str:
    """The token with a mark in it, unless it is one that an assistant writes itself."""
    is_own = role == "assistant" and OF_ASSISTANTS.search(token)
    return token if is_own else token[0] + SPELLED + token[1:]


def num_ids(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return one more than the tokenizer's largest id; some leave out ids between others."""
    return max(tokenizer.get_vocab().values()) + 1


def stop_ids_of(model_name_or_path: str, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Return the tokens at which a model's completions end, in order.

    They are the tokenizer's end of sequence, the ends of turns of its chat template, and what the
    model's generation_config.json lists.
    """
    from transformers import GenerationConfig

    try:
        listed = GenerationConfig.from_pretrained(model_name_or_path).eos_token_id
    except OSError:  # it has none
        listed = None
    return tuple(all_ends(tokenizer, listed))


def all_ends(tokenizer: PreTrainedTokenizerBase, listed: int | list[int] | None) -> list[int]:
    """Join the tokenizer's ends, those of turns among them, and a generation config's list."""
    listed = listed if isinstance(listed, list) else [listed]
    return sorted(Encoder(tokenizer).end_ids.union(i for i in listed if i is not None))


def control_tokens(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """A pattern that finds the tokenizer's special tokens, the longest first."""
    special = {token for token in tokenizer.all_special_tokens if token}
    special |= {str(t) for t in tokenizer.added_tokens_decoder.values() if t.special}
    longest_first = sorted(special, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


def cut(
    document: Document, max_length: int, truncation: Truncation, bos_id: int | None
) -> Document | None:
    """The document within max_length tokens; None if it is to be left out.

    keep_start: the first tokens; the answer that is cut then has no end token.
    keep_end: the last tokens, after the BOS token if the document begins with one. The first token
        is not trained: nothing predicts it.
    drop: only a document that fits.
    """
    ids, trained = document
    if len(ids) <= max_length:
        return document
    if truncation == "drop":
        return None
    if truncation == "keep_start":
        return ids[:max_length], trained[:max_length]
    opening = ids[:1] if ids[0] == bos_id else []
    start = len(ids) - max_length + len(opening)
    ids, trained = opening + ids[start:], [False] * len(opening) + trained[start:]
    return ids, [False, *trained[1:]]


def as_ids(ids: list[int]) -> numpy.ndarray:
    """Token ids in 4 bytes each, a tenth of what a list of Python numbers takes."""
    import numpy

    return numpy.asarray(ids, dtype=numpy.int32)


class Columns:
    """The columns of a dataset, filled row by row, in memory or in a file of Arrow's stream format.

    Args:
        kinds: what each column holds.
        path: the file; None: memory.

    Raises DataError naming the column whose values have no common type.
    """

    def __init__(self, kinds: Mapping[str, Kind], path: Path | None = None) -> None:
        self.kinds, self.path = kinds, path
        self.first: tuple | None = None
        self._rows: list[tuple] = []
        self._batches: list[pyarrow.RecordBatch] = []
        self._writer: pyarrow.RecordBatchStreamWriter | None = None
        self._num_rows = 0
        # Arrow finds the type of values of any kind from all of them together.
        self._batch_rows = math.inf if "any" in kinds.values() else BATCH_ROWS

    def __len__(self) -> int:
        return self._num_rows

    def append(self, row: tuple) -> None:
        """Add a value to each column, in the order of `kinds`."""
        self.first = self.first or row
        self._num_rows += 1
        self._rows.append(row)
        if len(self._rows) >= self._batch_rows:
            self._flush()

    def close(self) -> None:
        """Finish the file."""
        self._flush()
        if self._writer:
            self._writer.close()

    def dataset(self) -> Dataset:
        """A dataset of the rows in memory, without a cache on disk."""
        import datasets
        import pyarrow

        self._flush()
        table = datasets.table.InMemoryTable(pyarrow.Table.from_batches(self._batches))
        # Left to itself, Dataset pickles and hashes the whole table for a name in its cache on
        # disk, which a dataset in memory does not use.
        fingerprint = datasets.fingerprint.generate_random_fingerprint()
        dataset = datasets.Dataset(table, fingerprint=fingerprint)
        if "images" in self.kinds and not any(dataset["images"]):
            return dataset.remove_columns("images")
        return dataset

    def _flush(self) -> None:
        import pyarrow

        if not self._rows:
            return
        columns = zip(self.kinds.items(), zip(*self._rows, strict=True), strict=True)
        arrays = {name: _array(name, kind, values) for (name, kind), values in columns}
        self._rows = []
        batch = pyarrow.RecordBatch.from_pydict(arrays)
        if self.path is None:
            self._batches.append(batch)
            return
        self._writer = self._writer or pyarrow.ipc.new_stream(str(self.path), batch.schema)
        self._writer.write_batch(batch)


def longest_sequence(dataset: Dataset, prompt: str, *completions: str) -> int:
    """Return the most tokens that a prompt has with its longest completion; all are columns."""
    import numpy
    from pyarrow.compute import list_value_length

    longest = 0
    for batch in dataset.with_format("arrow").iter(BATCH_ROWS):
        lengths = [list_value_length(batch[name]).to_numpy() for name in (prompt, *completions)]
        longest = max(longest, int((lengths[0] + numpy.maximum.reduce(lengths[1:])).max()))
    return longest


def _array(name: str, kind: Kind, values: Sequence) -> pyarrow.Array:
    import pyarrow

    flag, text = pyarrow.bool_(), pyarrow.string()
    image = {"path": text, "bytes": pyarrow.large_binary(), "sha256": text}
    types = {
        "ids": pyarrow.list_(pyarrow.int32()),
        "flags": pyarrow.list_(flag),
        "flag": flag,
        "number": pyarrow.float64(),
        "images": pyarrow.list_(pyarrow.struct(image)),
        "any": None,
    }
    try:
        return pyarrow.array(values, type=types[kind])
    except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError, OverflowError) as error:
        raise DataError(
            f"column '{name}': its rows hold different types ({error}). Give every row the same "
            "type, or remove the column."
        ) from None
