"""Write docs/errors/: the text of every error that bad settings or data lead to.

    python scripts/make_errors.py

Texts are read from the code, as it stands after `ConfigError(` and `DataError(`; … stands for what
is filled in. docs/errors.md is written by hand and explains some of them: each text that it quotes
is linked from here. tests/scripts/test_make_errors.py holds these pages equal to the code.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
OUTPUT = ROOT / "docs" / "errors"
CLASSES = ("ConfigError", "DataError", "NonFiniteLossError", "NothingToLearnError", "LostRankError",
           "TeacherError", "SandboxUnavailableError", "ConversionError", "PushError")  # fmt: skip
GAP = "…"


class Page(NamedTuple):
    """One page: its name and title, the pages on its topic, the beginnings of its files' paths."""

    name: str
    title: str
    topics: tuple[str, ...]
    files: tuple[str, ...]


# A file goes to the first page that has a beginning of its path.
PAGES = (
    Page("commands", "posttrain COMMAND", ("cli", "evaluation", "report"),
         ("posttrain/cli.py", "posttrain/commands/", "posttrain/report/")),
    Page("images", "Images", ("vision",),
         ("posttrain/data/images.py", "posttrain/models/vision.py", "posttrain/packed/vision.py")),
    Page("files", "Data files and rows", ("data",),
         ("posttrain/data/read.py", "posttrain/data/formats.py", "posttrain/data/parsers.py",
          "posttrain/data/pairs.py", "posttrain/data/cache.py", "posttrain/data/tools.py")),
    Page("prompts", "Templates, tokens and lengths", ("data",), ("posttrain/data/",)),
    Page("cleaning", "posttrain data", ("data",), ("posttrain/hygiene/",)),
    Page("models", "Loading, adapting and merging models", ("models", "lora"),
         ("posttrain/models/",)),
    Page("packing", "Packed forwards and attention", ("models", "engines"), ("posttrain/packed/",)),
    Page("heads", "Heads that draft", ("heads", "lookahead"),
         ("posttrain/heads/", "posttrain/trainers/heads", "recipes/medusa.py", "recipes/mtp.py")),
    Page("rewards", "Rewards and judges", ("rewards",),
         ("posttrain/rewards/", "posttrain/judges/", "posttrain/sandbox/",
          "recipes/judge_setup.py")),
    Page("sampling", "Sampling and engines", ("rl", "engines", "lookahead"),
         ("posttrain/rollouts/vllm", "posttrain/rollouts/generator.py", "posttrain/rollouts/trees",
          "posttrain/rollouts/sampling.py", "posttrain/rollouts/lookahead.py",
          "posttrain/rollouts/own_cache.py", "posttrain/rollouts/partial")),
    Page("rollouts", "Rollouts", ("rl",), ("posttrain/rollouts/",)),
    Page("runs", "Settings, run folders and launches", ("reliability", "scaling"),
         ("posttrain/run/",)),
    Page("pairs", "Preferences and labels", ("preference",),
         ("posttrain/trainers/known_reference.py", "posttrain/trainers/preference.py",
          "posttrain/trainers/reward.py",
          "posttrain/trainers/unpaired.py", "posttrain/trainers/process_reward.py",
          "posttrain/trainers/online_dpo.py", "recipes/kto.py", "recipes/online_dpo.py")),
    Page("teachers", "Teachers", ("distill",),
         ("posttrain/self_instruct/", "posttrain/trainers/distill.py",
          "posttrain/trainers/teachers.py", "recipes/distill")),
    Page("training", "Training", ("rl",), ("posttrain/trainers/",)),
    Page("recipes", "Settings of recipes", ("rl",), ("recipes/", "posttrain/selection/")),
)  # fmt: skip


def texts_of(node: ast.expr, functions: dict[str, ast.FunctionDef] | None = None) -> list[str]:
    """Return the texts that a message may have, with … for each part that is filled in.

    `functions` are those of the file, by name, where one may return the text.
    """
    if isinstance(node, ast.Constant):
        return [str(node.value)]
    if isinstance(node, ast.JoinedStr):
        return ["".join(part.value if isinstance(part, ast.Constant) else GAP
                        for part in node.values)]  # fmt: skip
    if isinstance(node, ast.IfExp):
        return texts_of(node.body) + texts_of(node.orelse)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return [a + b for a in texts_of(node.left) for b in texts_of(node.right)]
    if isinstance(node, ast.Call) and functions:
        called = functions.get(ast.unparse(node.func).rpartition(".")[2])
        returned = (
            [r.value for r in ast.walk(called) if isinstance(r, ast.Return)] if called else []
        )
        return [text for value in returned if value for text in texts_of(value)] or [GAP]
    return [GAP]


def messages() -> Iterator[tuple[str, str]]:
    """File and text of each error, one line a text; only … where the text comes from elsewhere."""
    for path in sorted([*ROOT.glob("posttrain/**/*.py"), *ROOT.glob("recipes/*.py")]):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        functions = {
            node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in CLASSES:
                for text in texts_of(node.args[0], functions):
                    text = re.sub(f"{GAP}+", GAP, " ".join(text.split()))
                    yield path.relative_to(ROOT).as_posix(), text


def page_of(file: str) -> Page:
    """Return the page that a file's errors stand on."""
    return next(page for page in PAGES if file.startswith(page.files))


def anchors() -> dict[str, str]:
    """Map each text that docs/errors.md quotes to the anchor of the heading above it."""
    found, anchor = {}, ""
    text = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
    for block in re.split(r"\n\s*\n", text):
        if block.startswith("#"):
            anchor = re.sub(r"[^\w -]", "", block.lstrip("# ").lower()).replace(" ", "-")
        elif block.startswith(">"):
            found[" ".join(block.replace("\n>", "\n").removeprefix(">").split())] = anchor
    return found


def is_in(quoted: str, text: str) -> bool:
    """True where a quoted beginning, middle or whole is part of an error's text."""
    return quoted.strip(f"{GAP} ") in text


def line_of(text: str, explained: dict[str, str]) -> str:
    """Return a text as an entry, with a link where docs/errors.md explains it."""
    fence = "``" if "`" in text else "`"
    line = f"- {fence}{text}{fence}"
    links = [anchor for quoted, anchor in explained.items() if is_in(quoted, text)]
    return f"{line} [why](../errors.md#{links[0]})" if links else line


def pages() -> dict[str, str]:
    """Map the name of each page to its text."""
    explained, texts = anchors(), {page.name: set() for page in PAGES}
    for file, text in messages():
        if text.strip(f"{GAP} :."):
            texts[page_of(file).name].add(text)
    made = {}
    for page in PAGES:
        topics = ", ".join(f"[{name}.md](../{name}.md)" for name in page.topics)
        head = f"# Errors: {page.title}\n\nMade by `scripts/make_errors.py`. " \
               f"How to read them: [errors.md](../errors.md); the topic: {topics}.\n"  # fmt: skip
        entries = sorted(texts[page.name], key=lambda text: text.strip(f"{GAP}-':, ").lower())
        made[page.name] = "\n".join([head, *(line_of(text, explained) for text in entries), ""])
    return made


def main() -> None:
    """Write the pages."""
    OUTPUT.mkdir(exist_ok=True)
    for name, text in pages().items():
        (OUTPUT / f"{name}.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
