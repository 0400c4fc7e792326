"""Which part of the package may import which: the arrows of docs/design.md, over the real tree."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "posttrain"

# `errors` is only words for the user: a part that meets users may raise them.
ALONE = {
    "losses": set(),
    "advantages": set(),
    "rewards": {"errors", "sandbox"},
    "sandbox": {"errors"},
    "errors": set(),
}
FORBIDDEN = {
    "data": {"trainers", "rollouts", "teachers"},
    "teachers": {"trainers"},
    "packing": {"trainers"},
    "attention": {"trainers"},
    "logprobs": {"trainers"},
    "models": {"trainers"},
    "rollouts": {"trainers"},
}


def files_of(part: str) -> list[Path]:
    """`posttrain/part.py`, or every file below `posttrain/part/`."""
    module = PACKAGE / f"{part}.py"
    return [module] if module.exists() else sorted((PACKAGE / part).rglob("*.py"))


def imported_modules(source: str, package: str) -> set[str]:
    """Full names of all modules that a file of `package` imports, at the top or inside functions.

    `from a import b` counts as both `a` and `a.b`, since b may be a module.
    """
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, base] if base else parents)
            found |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return found


def parts_imported_by(path: Path) -> set[str]:
    """Top-level parts of our package (`losses`, `trainers`, …) that a file imports."""
    package = ".".join(path.relative_to(ROOT).parent.parts)
    names = imported_modules(path.read_text(), package)
    ours = {name.split(".")[1] for name in names if name.startswith("posttrain.")}
    return {part for part in ours if files_of(part)}


@pytest.mark.parametrize(("part", "allowed"), ALONE.items())
def test_part_imports_nothing_else_of_ours(part, allowed):
    for path in files_of(part):
        assert parts_imported_by(path) <= {part} | allowed, path


@pytest.mark.parametrize(("part", "forbidden"), FORBIDDEN.items())
def test_part_imports_nothing_above_it(part, forbidden):
    for path in files_of(part):
        assert not parts_imported_by(path) & forbidden, path


def test_nothing_imports_recipes():
    for path in PACKAGE.rglob("*.py"):
        package = ".".join(path.relative_to(ROOT).parent.parts)
        names = imported_modules(path.read_text(), package)
        assert not any(name.split(".")[0] == "recipes" for name in names), path


def test_the_rules_see_every_way_to_import():
    source = """
import posttrain.trainers.sft
from . import rl
from ..data import records
def late():
    from posttrain import rollouts
"""
    found = imported_modules(source, "posttrain.trainers")
    assert {
        "posttrain.trainers.sft",
        "posttrain.trainers.rl",
        "posttrain.data.records",
        "posttrain.rollouts",
    } <= found


def modules_loaded_by(statement: str) -> set[str]:
    program = f"import sys; {statement}; print(*sys.modules)"
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return {name.split(".")[0] for name in run.stdout.split()}


def test_losses_and_advantages_load_torch_and_nothing_above_it():
    loaded = modules_loaded_by("import posttrain.losses, posttrain.advantages")
    assert "torch" in loaded
    assert not loaded & {"transformers", "accelerate", "datasets", "trl", "peft", "tokenizers"}


def test_the_package_alone_loads_nothing_heavy():
    assert not modules_loaded_by("import posttrain") & {"torch", "numpy", "transformers"}
