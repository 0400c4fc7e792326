"""What happens to a document of more tokens than fit: cut at the end, at the start, or left out."""

from typing import Literal

Truncation = Literal["keep_start", "keep_end", "drop"]
Document = tuple[list[int], list[bool]]  # token ids, and whether each is trained


def cut(
    document: Document, max_length: int, truncation: Truncation, bos_id: int | None
) -> Document | None:
    """The document within max_length tokens; None where it is to be left out.

    keep_start: the first tokens; the answer that is cut then has no end token.
    keep_end: the last tokens, after the BOS token if the document begins with one. The first token
        is not trained: nothing predicts it.
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
