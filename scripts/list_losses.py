"""Write docs/losses_*.md: each loss with its formula, code, golden cases and paper.

    python scripts/list_losses.py            # writes the pages
    python scripts/list_losses.py --check    # says which of them are not what it would write

Formula and sources are those of the docstrings; golden cases those that a test's table gives to the
function.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from posttrain import losses

ROOT = Path(__file__).parents[1]
PAGES = {
    "preference": ("Losses of preferences", ("preference", "reference_free", "pointwise")),
    "policy": ("Losses of reinforcement learning", ("policy", "trust_region", "importance", "kl")),
    "others": (
        "Other losses",
        ("supervised", "reward_model", "value", "distillation", "lookahead", "masking"),
    ),
}
OTHERS = {
    "preference": "Of reinforcement learning: [losses_policy.md](losses_policy.md); of all else: "
    "[losses_others.md](losses_others.md).",
    "policy": "Of preferences: [losses_preference.md](losses_preference.md); of all else: "
    "[losses_others.md](losses_others.md).",
    "others": "Of preferences: [losses_preference.md](losses_preference.md); of reinforcement "
    "learning: [losses_policy.md](losses_policy.md).",
}
HEAD = """\
`from posttrain.losses import {example}`. Values are per pair, token or completion, never reduced;
docstrings give shapes, units and errors. A golden case is a value and gradient in float64, in
`tests/golden/{family}*.json`, that a test compares. {others}

| function | computes | golden cases | arXiv |
|---|---|---|---|
"""
ARXIV = re.compile(r"\b(\d{4}\.\d{4,5})\b")


def golden_cases() -> dict[str, list[str]]:
    """Return for each function the golden cases whose test calls it, by helpers and tables too."""
    digests = (ROOT / "tests/golden/digests.txt").read_text()
    ids = {line.split()[1] for line in digests.splitlines()}
    found: dict[str, list[str]] = {}
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        module = ast.parse(path.read_text(encoding="utf-8"))
        helpers = {node.name: node for node in module.body if isinstance(node, ast.FunctionDef)}
        for node in module.body:
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                helpers[node.targets[0].id] = node.value
        for case, node in cases_of(module, ids):
            for name in names_in(node, helpers, set()):
                found.setdefault(name, []).append(case)
    return found


def cases_of(module: ast.Module, ids: set[str]) -> Iterator[tuple[str, ast.AST]]:
    """Yield a case with what computes it: a table's value, or the test that reads the case."""
    for node in ast.walk(module):
        if isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                if isinstance(key, ast.Constant) and key.value in ids:
                    yield key.value, value
        elif isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            for part in ast.walk(node):
                if isinstance(part, ast.Constant) and part.value in ids:
                    yield part.value, node


def names_in(node: ast.AST, helpers: dict[str, ast.AST], seen: set[str]) -> set[str]:
    """Collect the names that a piece of a test uses, its module's helpers followed."""
    if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name):
        table = helpers.get(node.value.id)
        if isinstance(table, ast.Dict) and isinstance(node.slice, ast.Constant):
            pairs = zip(table.keys, table.values, strict=True)
            chosen = [v for k, v in pairs if getattr(k, "value", None) == node.slice.value]
            return set().union(*(names_in(v, helpers, seen) for v in chosen))
    if isinstance(node, ast.Name):
        helper = helpers.get(node.id)
        if helper is None or node.id in seen or isinstance(helper, ast.Dict):
            return {node.id}
        return names_in(helper, helpers, seen | {node.id})
    return set().union(*(names_in(part, helpers, seen) for part in ast.iter_child_nodes(node)))


def page(name: str) -> str:
    """Return the text of a page."""
    title, modules = PAGES[name]
    cases, rows = golden_cases(), []
    for module in modules:
        functions = {
            n: f
            for n, f in vars(losses).items()
            if inspect.isfunction(f) and f.__module__ == f"posttrain.losses.{module}"
        }
        for function in sorted(functions):
            text = inspect.getdoc(functions[function]) or ""
            summary = " ".join(text.partition("\n\n")[0].split())
            summary = summary.removeprefix("Compute ").replace("|", "\\|")
            link = f"[`{function}`](../posttrain/losses/{module}.py)"
            tested = ", ".join(f"`{case}`" for case in sorted(set(cases.get(function, ()))))
            papers = ", ".join(dict.fromkeys(ARXIV.findall(text)))
            rows.append(f"| {link} | {summary} | {tested} | {papers} |")
    example = {"preference": "dpo_loss", "policy": "gspo_loss", "others": "mtp_loss"}[name]
    family = {"preference": "preference", "policy": "policy", "others": ""}[name]
    head = HEAD.format(example=example, family=family, others=OTHERS[name])
    return f"# {title}\n\n{head}" + "\n".join(rows) + "\n"


def main() -> int:
    """Write or check the pages; return the number that differ."""
    stale = 0
    for name in PAGES:
        path = ROOT / "docs" / f"losses_{name}.md"
        text = page(name)
        if "--check" not in sys.argv:
            path.write_text(text, encoding="utf-8")
        elif not path.exists() or path.read_text(encoding="utf-8") != text:
            stale += 1
            print(f"{path.relative_to(ROOT)} is stale: run python scripts/list_losses.py")
    return stale


if __name__ == "__main__":
    sys.exit(main())
