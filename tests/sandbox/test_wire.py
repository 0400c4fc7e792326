"""Plain data over the line: exact types survive, and nothing else comes out of hostile bytes."""

import json
import math
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.sandbox import wire

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.complex_numbers(allow_nan=False)
    | st.text()
    | st.binary()
)
KEYS = st.recursive(SCALARS, lambda keys: st.tuples(keys, keys), max_leaves=4)
DATA = st.recursive(
    SCALARS,
    lambda data: (
        st.lists(data)
        | st.tuples(data, data)
        | st.sets(KEYS)
        | st.frozensets(KEYS)
        | st.dictionaries(KEYS, data)
    ),
    max_leaves=20,
)


def shape(data):
    """Data with the exact type of each part, in a form that == compares type by type."""
    if type(data) in (set, frozenset):
        return type(data), frozenset(map(shape, data))
    if type(data) in (list, tuple):
        return type(data), tuple(map(shape, data))
    if type(data) is dict:
        return dict, frozenset((shape(key), shape(value)) for key, value in data.items())
    return type(data), repr(data)


@settings(max_examples=50, deadline=None)
@given(DATA)
def test_data_comes_back_with_exact_types(data):
    assert shape(wire.decode(wire.encode(data))) == shape(data)


def test_big_integers_come_back():
    for number in [2**63, -(2**63), 10**5000, -(10**5000)]:
        assert wire.decode(wire.encode([number])) == [number]


def test_not_a_number_and_infinity_come_back():
    nan, infinity, part = wire.decode(wire.encode([math.nan, -math.inf, complex(0, math.nan)]))
    assert math.isnan(nan)
    assert infinity == -math.inf
    assert math.isnan(part.imag)


def test_dictionaries_of_collections_come_back_as_the_dict_that_they_equal():
    for data in [Counter("aab"), OrderedDict(a=1), defaultdict(int, a=1)]:
        found = wire.decode(wire.encode(data))
        assert type(found) is dict
        assert found == data


class Sneaky(str):
    __slots__ = ()

    def __eq__(self, other):
        return True

    __hash__ = str.__hash__


class Truth(int):
    pass


@pytest.mark.parametrize(
    "data",
    [
        Sneaky("x"),
        [Sneaky("x")],
        ["x", Sneaky("x")],
        {Sneaky("x"): 1},
        Truth(1),
        [1, Truth(1)],
        object(),
        iter([]),
        range(3),
        deque(),
        bytearray(b"x"),
        namedtuple("Point", "x")(1),
        int,
        print,
    ],
)
def test_objects_of_other_types_do_not_leave(data):
    with pytest.raises(wire.WireError, match="not plain data"):
        wire.encode(data)


def test_a_cycle_is_refused():
    data = []
    data.append(data)
    with pytest.raises(wire.WireError, match="nested"):
        wire.encode(data)


def nested(depth: int) -> list:
    data: list = []
    for _ in range(depth - 1):
        data = [data]
    return data


def test_what_encode_allows_decode_allows():
    deepest = {0: nested(wire.MAX_DEPTH - 1)}
    assert wire.decode(wire.encode(deepest)) == deepest
    with pytest.raises(wire.WireError, match="nested"):
        wire.encode([deepest])
    longest = -(16**wire.MAX_HEX_DIGITS - 1)
    assert wire.decode(wire.encode(longest)) == longest
    with pytest.raises(wire.WireError, match="bits"):
        wire.encode(longest * 16)


COLLIDING = [f'{{"i":"{k * (2**61 - 1):x}"}}' for k in range(1, 20)]  # all have hash 0


@pytest.mark.parametrize(
    "payload",
    [
        "",
        "nonsense",
        "NaN",
        "Infinity",
        "1" * 50,
        "[1",
        "[1] 2",
        '"\\""',
        "{}",
        '{"a":1,"b":2}',
        '{"unknown":1}',
        '{"t":"ab"}',
        '{"t":{"t":[1]}}',
        '{"s":[[1]]}',
        '{"d":[1]}',
        '{"d":[[1,2,3]]}',
        '{"d":[[[],1]]}',
        '{"b":"xx"}',
        '{"b":[1]}',
        '{"c":[1,2,3]}',
        '{"c":[[1],2]}',
        '{"i":"zz"}',
        '{"i":7}',
        '{"f":"one"}',
        '{"i":"' + "f" * (wire.MAX_HEX_DIGITS + 2) + '"}',
        "[" * 1_000 + "]" * 1_000,
        "[" * 100_000,
        '["]]]]]]]]]]]]",' * 300 + "1" + "]" * 300,
        '{"s":[' + ",".join(COLLIDING) + "]}",
        '{"d":[' + ",".join(f"[{key},1]" for key in COLLIDING) + "]}",
        "[" + "[]," * wire.MAX_CONTAINERS + "1]",
        '"' + "x" * wire.MAX_BYTES + '"',
    ],
)
def test_malformed_bytes_are_refused(payload):
    with pytest.raises(wire.WireError):
        wire.decode(payload.encode())


def test_bytes_beyond_ascii_are_refused():
    with pytest.raises(wire.WireError):
        wire.decode(b'"\xff"')


@settings(max_examples=50, deadline=None)
@given(st.binary(max_size=60) | st.text(alphabet='[]{}"\\:,tsdzbcif01 ').map(str.encode))
def test_any_bytes_give_plain_data_or_an_error(payload):
    try:
        data = wire.decode(payload)
    except wire.WireError:
        return
    wire.encode(data)


def test_strings_hold_no_quote_so_that_brackets_can_be_counted():
    text = '"[\\"]{\\\\"'
    payload = wire.encode([text])
    assert payload.count(b'"') == 2
    assert json.loads(payload) == [text]
