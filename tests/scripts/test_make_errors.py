"""docs/errors.md and docs/errors/ hold the texts of the code's errors, all and no others."""

import ast
import re

import pytest

from posttrain.errors import ConfigError
from posttrain.run.options import load
from recipes import dpo, grpo, sft
from scripts import make_errors

QUOTED = make_errors.anchors()
MOST_WORDS = 900

# Files that pass on the text of another error, or of a process, and what it is.
PASSED_ON = {
    "posttrain/rewards/pieces.py": "a reward's error in its worker",
    "posttrain/rollouts/options.py": "what an acceptance may not be used for",
    "posttrain/run/options.py": "a setting's error, with the place where it was written",
    "posttrain/sandbox/tiers.py": "why no sandbox can be used here",
    "posttrain/trainers/teachers.py": "what the row of a recording lacks",
}


@pytest.fixture(scope="module")
def pages() -> dict[str, str]:
    return make_errors.pages()


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return [text for _, text in make_errors.messages()]


def test_the_pages_are_what_the_script_makes_of_the_code(pages):
    files = {p.stem: p.read_text(encoding="utf-8") for p in make_errors.OUTPUT.glob("*.md")}
    assert files == pages, "run python scripts/make_errors.py"


@pytest.mark.parametrize("quoted", QUOTED)
def test_a_text_that_the_page_quotes_is_found_in_the_code(quoted, texts):
    assert any(make_errors.is_in(quoted, text) for text in texts)


def test_the_pages_are_short_and_named(pages):
    page = (make_errors.ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
    assert len(page.split()) < MOST_WORDS
    for name, text in pages.items():
        assert len(text.split()) < MOST_WORDS, f"split {name} in PAGES"
        assert f"(errors/{name}.md)" in page
        for topic in re.findall(r"\]\(\.\./(\w+\.md)\)", text):
            assert (make_errors.ROOT / "docs" / topic).is_file(), topic


def test_an_error_without_a_text_of_its_own_passes_one_on():
    found = {file for file, text in make_errors.messages() if not re.search(r"\w", text)}
    assert found <= set(PASSED_ON)


def test_every_error_class_of_the_package_is_listed():
    found = {"PosttrainError"}
    for path in make_errors.ROOT.glob("posttrain/**/*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef) and {ast.unparse(b) for b in node.bases} & found:
                found.add(node.name)
    assert found - {"PosttrainError"} == set(make_errors.CLASSES)


def test_texts_are_read_from_strings_of_all_kinds():
    def texts(code: str) -> list[str]:
        return make_errors.texts_of(ast.parse(code, mode="eval").body)

    assert texts('"a " "b"') == ["a b"]
    assert texts('f"--{name}: no {x:.2g} here" + (y or "")') == ["--…: no … here…"]
    assert texts('"a " + ("b" if c else f"{d}.")') == ["a b", "a …."]
    assert texts("problem") == ["…"]


@pytest.mark.parametrize(
    ("recipe", "flags"),
    [
        (sft, ["--learning_rat", "1"]),
        (dpo, ["--loss", "dop"]),
        (dpo, ["--config", "nowhere.yaml"]),
        (grpo, ["--num_generations", "7"]),
    ],
)
def test_what_a_mistake_prints_is_found_on_a_page(recipe, flags, pages):
    with pytest.raises(ConfigError) as raised:
        load(recipe.Config, flags)
    listed = "".join(pages.values())
    texts = re.findall(r"^- `+(.*?)`+(?: \[why\].*)?$", listed, re.MULTILINE)
    told = [text for text in texts if sum(map(str.isalpha, text)) > 10]
    patterns = [re.escape(text).replace(make_errors.GAP, ".*") for text in told]
    assert any(re.fullmatch(pattern, str(raised.value)) for pattern in patterns)
