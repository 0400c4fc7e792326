"""The pages for those who come from other toolkits name flags and fields that exist."""

import dataclasses
import re
from collections.abc import Iterator

import pytest

from tests.recipes.conftest import ROOT
from tests.recipes.test_readme import MODULES

PAGES = sorted(ROOT.glob("docs/coming_from*.md"))
HEADING = re.compile(r"^#+ .*?(?:`(\w+)`, )?`recipes/(\w+)\.py`$")
ROW = re.compile(r"^\| (`[^|]+`) \| ([^|]*)\|")
MOST_WORDS = 900


def rows(text: str) -> Iterator[tuple[str | None, str, list[str], list[str]]]:
    """Their class if it is named, our recipe, and the names and flags of each row below."""
    theirs = recipe = None
    for line in text.splitlines():
        if line.startswith("#"):
            found = HEADING.match(line)
            theirs, recipe = found.groups() if found else (None, None)
        elif recipe and (row := ROW.match(line)) and "divided by" not in line:
            names, flags = (re.findall(r"`(\S+?)`", cell) for cell in row.groups())
            yield theirs, recipe, names, flags


FOUND = [
    pytest.param(*row, id=f"{page.stem}: {row[2][0]}")
    for page in PAGES
    for row in rows(page.read_text(encoding="utf-8").split("Normalisation of the loss")[0])
]


@pytest.mark.parametrize(("theirs", "recipe", "names", "flags"), FOUND)
def test_a_row_names_flags_of_the_recipe_and_fields_of_trl(theirs, recipe, names, flags):
    settings = {field.name for field in dataclasses.fields(MODULES[recipe].Config)}
    assert [flag for flag in flags if flag.removeprefix("--") not in settings] == []
    if theirs:
        trl = pytest.importorskip("trl")
        fields = {field.name for field in dataclasses.fields(getattr(trl, theirs))}
        assert [name for name in names if name not in fields] == []


def test_rows_are_read_below_the_headings_that_name_a_recipe():
    text = (
        "# From X\n\n| `a` | `--b` | c |\n## Y: `Z`, `recipes/sft.py`\n| X | here |\n| `a` | | c |"
    )
    assert list(rows(text)) == [("Z", "sft", ["a"], [])]
    assert len(FOUND) > 60


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_pages_are_short(page):
    assert len(page.read_text(encoding="utf-8").split()) < MOST_WORDS
