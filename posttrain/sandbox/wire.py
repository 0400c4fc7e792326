"""The line between caller and sandbox: plain data as bytes and back, and the control messages.

    decode(encode({"a": (1, 2.0, b"x")})) == {"a": (1, 2.0, b"x")}

This is the one module of our side that the worker loads too (see `worker`), so it imports nothing
of ours. Exact types survive: True is not 1, a tuple is no list, nan and big integers come through.
The form is JSON; a type that JSON lacks is an object whose one key names it: {"t": [1, 2]} is a
tuple.

`decode` reads what untrusted code wrote. It builds built-in types only, and bounds size, depth,
number of containers and length of integers before it builds anything. Inside strings, quotes and
backslashes are written as \\uXXXX. So a quote always begins or ends a string, and the brackets
outside of strings give the depth, whatever the JSON parser's own limit is.
"""

from __future__ import annotations

import json
import re
import struct
from collections import Counter, OrderedDict, defaultdict
from dataclasses import dataclass
from itertools import accumulate
from json.encoder import encode_basestring_ascii
from math import isfinite
from typing import TypeAlias, TypedDict

MAX_BYTES = 4 << 20
MAX_DEPTH = 64  # of the data; a container is at most three brackets deep in JSON
MAX_CONTAINERS = 200_000  # an empty list is 2 bytes on the line and 56 in memory
MAX_HEX_DIGITS = 1 << 15  # arithmetic and printing take quadratic time beyond it
MAX_SAME_HASH = 16  # a set of colliding integers takes quadratic time to build

PlainData: TypeAlias = (
    "bool | int | float | complex | str | bytes | list[PlainData] | tuple[PlainData, ...] | "
    "set[PlainData] | frozenset[PlainData] | dict[PlainData, PlainData] | None"
)

HEADER = struct.Struct(">I")
_SMALL = 1 << 63
_DICTS = (dict, OrderedDict, Counter, defaultdict)
_STEP = [0] * 256
_STEP[ord("[")] = _STEP[ord("{")] = 1
_STEP[ord("]")] = _STEP[ord("}")] = -1
_STRINGS = re.compile(rb'"[^"]*"')
_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))


class WireError(ValueError):
    """The data is not plain, or there is too much of it."""


class Setup(TypedDict):
    """The first control message to a worker: its settings. The descriptor number is its own."""

    tier: str
    allow_subprocess: bool
    caller_pidfd: int


@dataclass(frozen=True)
class RunSettings:
    """The control message that begins a run: its limits. See `interface.Limits`.

    The worker sets `max_tasks`, the limit on processes and threads; 0 is no limit.
    """

    wall_seconds: float
    cpu_seconds: int
    memory_bytes: int
    scratch_bytes: int
    max_processes: int
    max_tasks: int = 0


@dataclass(frozen=True)
class Ending:
    """The control message that reports how a run ended.

    Attributes:
        failed: Our own failure in one line; "" if the run took place. The rest then says nothing.
        status: The wait status of the run's process.
        cpu_seconds: Processor time that the run used.
        stopped: Why the worker ended the run: "wall", its deadline, or "asked", by the caller; ""
            if it did not.
        wall_seconds: Time from start to end.
    """

    failed: str = ""
    status: int = 0
    cpu_seconds: float = 0.0
    stopped: str = ""
    wall_seconds: float = 0.0


def frame(data: PlainData) -> bytes:
    """Encode data with its length in front, as it goes over a stream."""
    payload = encode(data)
    return HEADER.pack(len(payload)) + payload


def encode(data: PlainData) -> bytes:
    """Encode plain data. WireError for anything else, and for data that `decode` would refuse."""
    payload = _text(data, MAX_DEPTH).encode("ascii")
    if len(payload) > MAX_BYTES:
        raise WireError(f"more than {MAX_BYTES} bytes of data")
    return payload


def _text(data: PlainData, depth: int) -> str:
    kind = type(data)
    if kind is str:
        return _quote(data)
    if kind is bool or data is None:
        return json.dumps(data)
    if kind is int:
        return repr(data) if -_SMALL < data < _SMALL else f'{{"i":"{_hex(data)}"}}'
    if kind is float:
        return repr(data) if isfinite(data) else f'{{"f":"{data!r}"}}'
    if kind is bytes:
        return f'{{"b":"{data.hex()}"}}'
    if kind is complex:
        return f'{{"c":{_items([data.real, data.imag], depth)}}}'
    if not depth:
        raise WireError(f"data nested deeper than {MAX_DEPTH}")
    if kind is list:
        return _items(data, depth)
    if kind in _TAGS:
        return f'{{"{_TAGS[kind]}":{_items(list(data), depth)}}}'
    if kind in _DICTS:
        pairs = ",".join([_items(pair, depth) for pair in dict.items(data)])
        return f'{{"d":[{pairs}]}}'
    raise WireError(f"not plain data: {kind.__name__}")


def _items(items: list | tuple, depth: int) -> str:
    kinds = set(map(type, items))
    if kinds == {str}:
        texts = map(_quote, items)
    elif kinds == {int} and min(items) > -_SMALL and max(items) < _SMALL:
        texts = map(repr, items)
    else:
        texts = [_text(item, depth - 1) for item in items]
    return f"[{','.join(texts)}]"


def _quote(text: str) -> str:
    quoted = encode_basestring_ascii(text)
    if "\\" in quoted:
        quoted = quoted.replace("\\\\", "\\u005c").replace('\\"', "\\u0022")
    return quoted


def _hex(number: int) -> str:
    if number.bit_length() > 4 * MAX_HEX_DIGITS:
        raise WireError(f"an integer of {number.bit_length()} bits")
    return f"{number:x}"


_TAGS = {tuple: "t", set: "s", frozenset: "z"}


def decode(payload: bytes) -> PlainData:
    """Restore the data that `encode` was given. WireError for bytes that it would not have made."""
    if len(payload) > MAX_BYTES:
        raise WireError(f"more than {MAX_BYTES} bytes of data")
    if b'\\"' in payload:
        raise WireError("an escaped quote")
    brackets = _STRINGS.sub(b"", payload).translate(None, _NO_BRACKETS)
    if len(brackets) > 2 * MAX_CONTAINERS:
        raise WireError(f"more than {MAX_CONTAINERS} containers")
    if max(accumulate(map(_STEP.__getitem__, brackets)), default=0) > 3 * MAX_DEPTH + 3:
        raise WireError("nested too deeply")
    try:
        return _DECODER.decode(payload.decode("ascii"))
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as problem:
        raise WireError(f"not plain data: {type(problem).__name__}") from None


def _small_int(digits: str) -> int:
    if len(digits) > 20:
        raise WireError("a long integer that is not in hexadecimal")
    return int(digits)


def _untag(pairs: list[tuple[str, PlainData]]) -> PlainData:
    if len(pairs) != 1:
        raise WireError("an object with more than one key")
    tag, body = pairs[0]
    kind, build = _BUILDERS[tag]
    if type(body) is not kind:
        raise WireError("a tag with the wrong body")
    return build(body)


def _hashed(items: list) -> list:
    hashes = sorted(map(hash, items))
    if any(map(int.__eq__, hashes, hashes[MAX_SAME_HASH:])):
        raise WireError(f"more than {MAX_SAME_HASH} keys with the same hash")
    return items


def _dict(pairs: list[list]) -> dict:
    _hashed([key for key, _ in pairs])
    return dict(pairs)


def _big_int(digits: str) -> int:
    if len(digits) > MAX_HEX_DIGITS + 1:  # a sign
        raise WireError("an integer with too many digits")
    return int(digits, 16)


def _refuse_constant(name: str) -> None:
    raise WireError(f"a bare {name}")


_BUILDERS = {
    "t": (list, tuple),
    "s": (list, lambda items: set(_hashed(items))),
    "z": (list, lambda items: frozenset(_hashed(items))),
    "d": (list, _dict),
    "b": (str, bytes.fromhex),
    "c": (list, lambda parts: complex(*parts)),
    "i": (str, _big_int),
    "f": (str, float),
}
_DECODER = json.JSONDecoder(
    object_pairs_hook=_untag, parse_int=_small_int, parse_constant=_refuse_constant
)
