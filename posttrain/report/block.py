"""The JSON block of a page: data that no browser takes for markup, and its size in the file.

safe_json("</script>")      # '"\\u003c/script\\u003e"'
size_of("</script>")        # 21
"""

from __future__ import annotations

import json

# No HTML parser ends a script at these, nor does JavaScript see a line's end in them.
UNSAFE = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"}


def safe_json(value: object) -> str:
    """Write a value as JSON that can stand inside a script element, whatever texts it holds."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character, escape in UNSAFE.items():
        text = text.replace(character, escape)
    return text


def size_of(value: object) -> int:
    """Return the bytes that a value takes in the file of a page."""
    return len(safe_json(value).encode("utf-8", "replace"))
