r"""What stands beside an answer's value: a unit, or the base of its numeral.

split_unit("15 cm^2")       # ("15", "cm^2")
split_unit("$18")           # ("18", "dollar")
units_agree("", "apple")    # True: a unit on one side only is no difference
split_base("204_5")         # ("204", "5")
"""

from __future__ import annotations

import re

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
# A word that changes what the number says, so that it is no unit.
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
MAX_UNIT_CHARS = 300  # a longer text is not searched for a unit, which costs its length squared


def split_unit(text: str) -> tuple[str, str]:
    """A normalised answer's value and its unit in one spelling; the unit is "" where none stands.

    A word is a unit behind a number. Behind anything with letters only a known unit is, because
    "x m" may be a product.
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
    """Units that are both there must be the same; "red apple" is an apple."""
    if not gold or not answer:
        return True
    one, other = set(gold.split()), set(answer.split())
    return one <= other or other <= one


def split_base(text: str) -> tuple[str, str] | None:
    """The digits and the base of a numeral that is written with its base, else None."""
    match = _BASE.fullmatch(text)
    if not match:
        return None
    base = match["low"] or match["word"]
    digits = match["digits"].lstrip("0").upper() or "0"
    return digits, _BASES.get(base, base)


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
    """A word of a language, not a product of variables; behind a known unit a short one may be."""
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
