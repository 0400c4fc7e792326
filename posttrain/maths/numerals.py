r"""Reading written numbers exactly, with the unit or base that stands beside them.

    read_number("1 1/2")                  # Fraction(3, 2)
    read_number("1.5e3")                  # Fraction(1500, 1)
    read_number(r"0.1\overline{6}")       # Fraction(1, 6)
    read_number("9**9**9")                # None: an expression is not a numeral
    split_unit("15 cm^2")                 # ("15", "cm^2")
    split_unit("$18")                     # ("18", "dollar")
    units_agree("", "apple")              # True: a unit on one side only is no difference
    split_base("204_5")                   # ("204", "5")

Nothing is evaluated, and length and exponent are capped, so that no input costs more than
microseconds. `1,000` and `1 000` are a thousand (before groups of three digits). Only
`same_number`, which sees what it is compared with, takes `1,5` for one and a half.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from fractions import Fraction

MAX_NUMERAL_CHARS = 300
MAX_EXPONENT = 1_000  # largest power of ten; 1e999999 written out would fill a megabyte
DOUBLE_DIGITS = 15  # digits that a double always has: such a decimal is a computer's 1/12

_DECIMAL = (
    r"(?:[1-9][0-9]{0,2}(?:(?:,[0-9]{3})+|(?: [0-9]{3})+)(?:\.[0-9]+)?"
    r"|[0-9]+(?:\.[0-9]*)?|\.[0-9]+)"
)
_SIGNED = rf"(?:[+-] ?)?{_DECIMAL}"
_PLAIN = re.compile(_DECIMAL)
_FRACTION = re.compile(
    rf"({_DECIMAL}) ?/ ?({_SIGNED})|\\frac ?\{{ ?({_SIGNED}) ?\}} ?\{{ ?({_SIGNED}) ?\}}"
)
_MIXED = re.compile(r"([0-9]+)(?: ([0-9]+) ?/ ?([0-9]+)| ?\\frac ?\{([0-9]+)\} ?\{([0-9]+)\})")
_SCIENTIFIC = re.compile(
    rf"({_DECIMAL})[eE]([+-]?[0-9]+)"
    rf"|(?:({_DECIMAL}) ?(?:\\times|\\cdot|[*x]) ?)?"
    r"10 ?\^ ?(?:\{ ?([+-]?[0-9]+) ?\}|([+-]?[0-9]+))"
)
_REPEATING = re.compile(
    r"([0-9]*)\.([0-9]*)(?:\\(?:overline|bar|dot) ?(?:\{ ?([0-9]+) ?\}|([0-9]))|\(([0-9]+)\))"
)
_GOING_ON = re.compile(r"([0-9]*)\.([0-9]*?)([0-9])\3{2,} ?\.\.\.")
_MAGNITUDE = re.compile(r"(.*[0-9]) ?(hundred|thousand|million|billion|trillion)")
_MAGNITUDES = {
    "hundred": 10**2,
    "thousand": 10**3,
    "million": 10**6,
    "billion": 10**9,
    "trillion": 10**12,
}
_DECIMAL_COMMA = re.compile(r"-?(?:0,[0-9]+|[1-9][0-9]*,(?![0-9]{3}$)[0-9]+)")

_SYNONYMS = {
    "dollar": "$ usd buck",
    "cent": "¢",
    "euro": "€ eur",
    "pound sterling": "£ gbp",
    "yen": "¥",
    "degree": "deg",
    "mm": "millimeter millimetre",
    "cm": "centimeter centimetre cms",
    "dm": "decimeter decimetre",
    "m": "meter metre",
    "km": "kilometer kilometre",
    "inch": "in inche",
    "foot": "ft feet",
    "yard": "yd",
    "mile": "mi",
    "mg": "milligram",
    "g": "gram gm",
    "kg": "kilogram kilo",
    "ounce": "oz",
    "pound": "lb",
    "ml": "milliliter millilitre mL",
    "l": "liter litre L",
    "second": "s sec",
    "minute": "min",
    "hour": "h hr",
    "mile/hour": "mph",
    "km/hour": "kph kmh",
    "m/second": "mps",
    "radian": "rad",
    "unit": "",
    "people": "person",
    "child": "children",
    "man": "men",
    "woman": "women",
    "am": "",
    "pm": "",
}
_CANONICAL = {
    name: unit for unit, synonyms in _SYNONYMS.items() for name in (unit, *synonyms.split())
}
_KNOWN = {unit for unit in _CANONICAL if unit.isalpha()}
# Words that change the meaning of the number, so that they are not units.
_NOT_UNIT_WORDS = """
or and to not no nor plus minus times over less more than least most if unless but between through
until mod modulo squared cubed factorial base hundred thousand million billion trillion dozen half
third quarter maybe about around under above below up greater smaller except either neither wrong
incorrect is are was be different any other
"""
_NOT_UNITS = frozenset(_NOT_UNIT_WORDS.split())
_POWERED = r"[A-Za-z]+\.?(?: ?\^ ?\{?-?[0-9]\}?)?"
_TAIL = re.compile(
    rf"(?P<value>.*?[0-9A-Za-z)}}!])(?P<gap> ?)"
    rf"(?P<unit>(?:\^\\circ(?: ?[CF](?![A-Za-z]))?|(?<![\\A-Za-z]){_POWERED})"
    rf"(?:(?: ?/ ?| per | (?:\\cdot )?){_POWERED})*)"
)
_ANGLE_FUNCTION = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)(?![A-Za-z])")
_CURRENCY = re.compile(r"(?P<sign>[+-] ?)?(?P<unit>[$€£¥]) ?(?P<value>.+)")
_CURRENCY_BEHIND = re.compile(r"(?P<value>.*[0-9]) ?(?P<unit>[$€£¥¢])")
_BASE = re.compile(
    r"\(?(?P<digits>[0-9A-Fa-f]*[0-9][0-9A-Fa-f]*)\)?"
    r"(?: ?_ ?\{? ?\(?(?P<low>[0-9]{1,2}|[a-z]+)\)? ?\}?| base (?P<word>[0-9]{1,2}|[a-z]+))"
)
_BASES = {"two": "2", "three": "3", "five": "5", "eight": "8", "ten": "10", "sixteen": "16"}
_MAX_UNIT_WORDS = 5
MAX_UNIT_CHARS = 300  # the search for a unit takes time quadratic in the length


def read_number(text: str) -> Fraction | None:
    """Read a normalised numeral, sign and percent sign included. None for all other text.

    A percent sign divides by a hundred: "50%" is 1/2.
    """
    if len(text) > MAX_NUMERAL_CHARS:
        return None
    scale = Fraction(1)
    if text.endswith("%"):
        text, scale = text[:-1].rstrip(), Fraction(1, 100)
    if match := _MAGNITUDE.fullmatch(text):
        text, scale = match[1], scale * _MAGNITUDES[match[2]]
    if text[:1] in ("+", "-"):
        scale = -scale if text[0] == "-" else scale
        text = text[1:].lstrip()
    if _PLAIN.fullmatch(text):
        return scale * _decimal(text)
    for read in (_fraction, _mixed, _scientific, _repeating):
        value = read(text)
        if value is not None:
            return scale * value
    return None


def same_number(gold: str, answer: str, *, relative_tolerance: float = 0.0) -> bool | None:
    """Tell whether two texts are the same number. None if one of them is not a number.

    Exact, except for `relative_tolerance` (a share of the gold, 0 by default) and these three:

    - a percent sign on one side only may be a unit: "50" is "50%", as is "1/2". A number below one
      is a share, so that "0.5" is not "0.5%";
    - an answer "1,5" is 1.5, and a gold "1,25" is 1.25 where the answer is a single number;
    - a decimal of 15 digits or more that is the other side rounded: a computer's 1/12.
    """
    gold_number, number = read_number(gold), read_number(answer)
    if gold_number is None and number is not None and "," in gold and gold[-2:-1] != ",":
        gold_number = _decimal_comma(gold)
    elif number is None and gold_number is not None:
        number = _decimal_comma(answer)
    if gold_number is None or number is None:
        return None
    if abs(gold_number - number) <= Fraction(relative_tolerance) * abs(gold_number):
        return True
    if gold.endswith("%") != answer.endswith("%"):
        bare, share = (gold_number, number) if answer.endswith("%") else (number, gold_number)
        return abs(bare) >= 1 and bare == share * 100
    return any(
        decimals is not None and abs(gold_number - number) * 10**decimals <= Fraction(1, 2)
        for decimals in (double_decimals(gold), double_decimals(answer))
    )


def double_decimals(text: str) -> int | None:
    """Count the decimals of a plain decimal with as many digits as a computer prints, else None."""
    text = text.lstrip("+- ")
    _, point, decimals = text.partition(".")
    digits = text.replace(".", "").lstrip("0")
    if not (point and len(digits) <= MAX_NUMERAL_CHARS and re.fullmatch("[0-9]+", digits)):
        return None
    return len(decimals) if len(digits) >= DOUBLE_DIGITS else None


def split_unit(text: str) -> tuple[str, str]:
    """Split a normalised answer into its value and its unit, "" if there is none.

    A word after a number is a unit. After anything with letters, only a known unit is one, because
    "x m" may be a product. Units come in one spelling.
    """
    if len(text) > MAX_UNIT_CHARS:
        return text, ""
    for pattern in (_CURRENCY, _CURRENCY_BEHIND):
        if match := pattern.fullmatch(text):
            sign = (match.groupdict().get("sign") or "").strip()
            value, unit = split_unit(sign + match["value"])
            money = _CANONICAL[match["unit"]]
            return value, money if unit in ("", money) else f"{money} {unit}"
    match = _TAIL.fullmatch(text)
    if not match or not _is_unit(match["value"], match["gap"], match["unit"]):
        return text, ""
    return match["value"].strip(), _one_spelling(match["unit"])


def units_agree(gold: str, answer: str) -> bool:
    """Tell whether two units agree. One may be missing, and a "red apple" is an apple."""
    if not gold or not answer:
        return True
    one, other = set(gold.split()), set(answer.split())
    return one <= other or other <= one


def split_base(text: str) -> tuple[str, str] | None:
    """Split a numeral that is written with its base into digits and base; None for others."""
    match = _BASE.fullmatch(text)
    if not match:
        return None
    base = match["low"] or match["word"]
    digits = match["digits"].lstrip("0").upper() or "0"
    return digits, _BASES.get(base, base)


def _decimal(digits: str) -> Fraction:
    sign = -1 if digits.startswith("-") else 1
    plain = digits.lstrip("+- ").replace(",", "").replace(" ", "")
    whole, _, decimals = plain.partition(".")
    return Fraction(sign * int(whole + decimals), 10 ** len(decimals))


def _decimal_comma(text: str) -> Fraction | None:
    return _decimal(text.replace(",", ".")) if _DECIMAL_COMMA.fullmatch(text) else None


def _groups(match: re.Match[str]) -> Iterator[str]:
    return (group for group in match.groups() if group is not None)


def _fraction(text: str) -> Fraction | None:
    match = _FRACTION.fullmatch(text)
    if not match:
        return None
    numerator, denominator = map(_decimal, _groups(match))
    return numerator / denominator if denominator else None


def _mixed(text: str) -> Fraction | None:
    match = _MIXED.fullmatch(text)
    if not match:
        return None
    whole, numerator, denominator = map(int, _groups(match))
    # "2 3/2" is no mixed number: more likely a product, or a slip
    return whole + Fraction(numerator, denominator) if numerator < denominator else None


def _scientific(text: str) -> Fraction | None:
    match = _SCIENTIFIC.fullmatch(text)
    if not match:
        return None
    *mantissa, exponent = _groups(match)
    if abs(int(exponent)) > MAX_EXPONENT:
        return None
    return (_decimal(mantissa[0]) if mantissa else 1) * Fraction(10) ** int(exponent)


def _repeating(text: str) -> Fraction | None:
    """Read 0.1666… as (16 - 1) / 90: the digits with one period, less those without, over nines."""
    match = _REPEATING.fullmatch(text) or _GOING_ON.fullmatch(text)
    if not match:
        return None
    whole, once, period = _groups(match)
    repeated = int(whole + once + period) - int(whole + once or "0")
    return Fraction(repeated, (10 ** len(period) - 1) * 10 ** len(once))


def _is_unit(value: str, gap: str, unit: str) -> bool:
    words = re.findall("[A-Za-z]+", unit.replace(r"^\circ", ""))
    if len(words) > _MAX_UNIT_WORDS or any(word.lower() in _NOT_UNITS for word in words):
        return False
    if unit.startswith("^"):
        return not _ANGLE_FUNCTION.search(value)
    has_letters = bool(re.search(r"(?<![\\A-Za-z])[A-Za-z]", re.sub(r"\\[A-Za-z]+", "", value)))
    is_known = all(_singular(word) in _CANONICAL for word in words)
    if not re.search(r"[0-9]|\\pi", value) and not (is_known and gap and len(words[0]) > 1):
        return False
    if is_known:
        return (bool(gap) and (not has_letters or len(words[0]) > 1)) or len(words[0]) > 1
    return bool(gap) and not has_letters and all(_is_plain_word(word) for word in words)


def _is_plain_word(word: str) -> bool:
    """Tell a word of a language, or a known short unit, from a product of variables."""
    return (len(word) >= 3 and bool(re.search("[aeiou]", word))) or word in _KNOWN


def _one_spelling(unit: str) -> str:
    unit = unit.replace(r"^\circ", "degree ").replace(r"\cdot", " ").replace(" per ", "/")
    unit = re.sub(r" ?\^ ?\{?(-?[0-9])\}?", r"^\1", re.sub(" ?/ ?", "/", unit))
    unit = re.sub("[A-Za-z]+", lambda word: _CANONICAL.get(*2 * [_singular(word[0])]), unit)
    unit = re.sub(r"\b(?:sq\.?|square) (?!unit)(\S+)", r"\1^2", unit)
    unit = re.sub(r"\b(?:cu\.?|cubic) (?!unit)(\S+)", r"\1^3", unit)
    return " ".join(unit.replace(".", "").split())


def _singular(word: str) -> str:
    if word in _CANONICAL:
        return word
    lower = word.lower()
    if lower in _CANONICAL:
        return lower
    if lower.endswith("ies") and len(lower) > 4:
        return lower[:-3] + "y"
    if lower.endswith(("ches", "shes", "sses", "xes")):
        return lower[:-2]
    return lower[:-1] if len(lower) > 2 and lower.endswith("s") and lower[-2] != "s" else lower
