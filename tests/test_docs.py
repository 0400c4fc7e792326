"""The documents hold together: links lead somewhere, pages are short, tables are the code's."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MOST_WORDS = 900
PAGES = sorted((ROOT / "docs").glob("*.md"))
DOCUMENTS = [
    *PAGES,
    *(
        ROOT / name
        for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "recipes/README.md")
    ),
    *(ROOT / name for name in ("data/README.md", "benchmarks/README.md")),
    ROOT / "benchmarks/RESULTS.md",
]
LINK = re.compile(r"\]\(([^)\s]+)\)")
FENCED = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def anchors_of(path: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#{1,6} (.+)$", FENCED.sub("", path.read_text("utf-8")), re.MULTILINE)
    kept = (re.sub(r"[^\w\- ]", "", heading.strip().lower()) for heading in headings)
    return {heading.replace(" ", "-") for heading in kept}


@pytest.mark.parametrize("path", sorted((ROOT / "docs").rglob("*.md")), ids=name_of)
def test_a_page_is_short(path):
    assert len(path.read_text(encoding="utf-8").split()) <= MOST_WORDS


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_links_lead_to_a_file_and_a_heading_of_it(path):
    broken = []
    for link in LINK.findall(FENCED.sub("", path.read_text(encoding="utf-8"))):
        target, _, anchor = link.partition("#")
        if "://" in target:
            continue
        found = (path.parent / target) if target else path
        is_page = found.suffix == ".md" and found.is_file()
        if not found.exists() or (anchor and is_page and anchor not in anchors_of(found)):
            broken.append(link)
    assert not broken


def test_every_page_is_in_the_index():
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    missing = [p.name for p in PAGES if p.name != "README.md" and f"({p.name})" not in index]
    assert not missing


def test_pages_that_the_code_names_are_there():
    found = set()
    for folder in ("posttrain", "recipes", "benchmarks", "scripts"):
        for path in (ROOT / folder).rglob("*.py"):
            found |= set(re.findall(r"docs/[\w/]+\.md", path.read_text(encoding="utf-8")))
    assert found
    assert not [page for page in found if not (ROOT / page).is_file()]


def test_the_tables_of_losses_are_those_of_the_docstrings():
    command = [sys.executable, "scripts/list_losses.py", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_picture_of_the_readme_is_small():
    assert (ROOT / "docs" / "report.png").stat().st_size < 150_000
