"""Plain data as bytes and back, for the line between caller and sandbox. Both sides load it.

    decode(encode({"a": (1, 2.0, b"x")})) == {"a": (1, 2.0, b"x")}

Exact types survive: True is not 1, a tuple is no list, nan and big integers come through. The form
is JSON; what JSON lacks is an object with one key that names the type: {"t": [1, 2]} is a tuple.

What is decoded was written by untrusted code. It builds built-in types only, and its size, depth,
number of containers and length of integers are bounded before anything is built. Inside strings
quotes and backslashes are written as \\uXXXX, so that a quote always begins or ends a string and
the brackets outside of strings give the depth, whatever the JSON parser's own limit is.
"""

from __future__ import annotations

import json
import re
import struct
from collections import Counter, OrderedDict, defaultdict
from itertools import accumulate
from json.encoder import encode_basestring_ascii
from math import isfinite
from typing import Any

MAX_BYTES = 4 << 20
MAX_DEPTH = 64  # of the data; a container is at most three brackets deep in JSON
MAX_CONTAINERS = 200_000  # an empty list is 2 bytes on the line and 56 in memory
MAX_HEX_DIGITS = 1 << 15  # what people do with longer integers is quadratic
MAX_SAME_HASH = 16  # a set of colliding integers takes quadratic time to build

HEADER = struct.Struct(">I")
_SMALL = 1 << 63
_DICTS = (dict, OrderedDict, Counter, defaultdict)
_STEP = [0] * 256
_STEP[ord("[")] = _STEP[ord("{")] = 1
_STEP[ord("]")] = _STEP[ord("}")] = -1
_STRINGS = re.compile(rb'"[^"]*"')
_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))


class WireError(ValueError):
    """Not plain data, or too much of it."""


def frame(data: Any) -> bytes:
    """Data with its length in front, as it goes over a stream."""
    payload = encode(data)
    return HEADER.pack(len(payload)) + payload


def encode(data: Any) -> bytes:
    """Plain data as bytes. WireError for anything else, and for what `decode` would refuse."""
    payload = _text(data, MAX_DEPTH).encode("ascii")
    if len(payload) > MAX_BYTES:
        raise WireError(f"more than {MAX_BYTES} bytes of data")
    return payload


def _text(data: Any, depth: int) -> str:
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


def decode(payload: bytes) -> Any:
    """What `encode` was given. WireError for bytes that it would not have made."""
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


def _untag(pairs: list[tuple[str, Any]]) -> Any:
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
