"""Which part of the package may import which: the arrows of docs/design.md, over the real tree."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "posttrain"

# What each part may import of ours. `errors` is only words for the user: any part may raise them.
# `advantages` and `losses` need nothing else of ours: they can be used in any other trainer.
ARROWS = {
    "losses": set(),
    "advantages": {"losses"},
    "errors": set(),
    "workers": set(),
    "sandbox": set(),
    "run": set(),
    "data": set(),
    "maths": {"workers"},
    "programs": {"sandbox"},
    "rewards": {"maths", "programs", "sandbox", "workers"},
    "hygiene": {"data", "run"},
    "packed": {"run"},
    "heads": {"losses", "packed", "run"},
    "models": {"heads", "packed", "run"},
    "rollouts": {"advantages", "packed", "rewards", "run"},
    "selection": {"rewards", "rollouts", "run"},
    "self_instruct": {"data", "models", "rollouts", "run"},
    "judges": {"rewards", "run", "self_instruct"},
    "report": {"run"},
    "trainers": {
        "advantages",
        "data",
        "heads",
        "losses",
        "packed",
        "rewards",
        "rollouts",
        "run",
        "report",
    },
    "commands": {"data", "hygiene", "models", "packed", "rewards", "rollouts", "run", "report"},
    "cli": {"commands", "run"},
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


def parts() -> set[str]:
    """All packages and modules directly below `posttrain`."""
    files = {path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py")}
    return {Path(file.parts[0]).stem for file in files} - {"__init__"}


def test_every_part_of_the_package_has_its_arrows():
    assert parts() == set(ARROWS)


def test_no_module_but_four_lies_at_the_top():
    assert {path.name for path in PACKAGE.glob("*.py")} == {
        "__init__.py", "advantages.py", "cli.py", "errors.py"
    }  # fmt: skip


@pytest.mark.parametrize(("part", "allowed"), ARROWS.items())
def test_a_part_imports_only_what_its_arrows_allow(part, allowed):
    for path in files_of(part):
        assert parts_imported_by(path) <= {part, "errors"} | allowed, path


def test_the_arrows_have_no_cycle():
    left = {part: set(allowed) for part, allowed in ARROWS.items()}
    while left:
        leaves = {part for part, allowed in left.items() if not allowed & left.keys()}
        assert leaves, left
        left = {part: allowed for part, allowed in left.items() if part not in leaves}


def test_nothing_imports_recipes():
    for path in PACKAGE.rglob("*.py"):
        package = ".".join(path.relative_to(ROOT).parent.parts)
        names = imported_modules(path.read_text(), package)
        assert not any(name.split(".")[0] == "recipes" for name in names), path


def test_what_runs_inside_the_sandbox_imports_nothing_of_our_side_but_the_wire():
    """And the wire, which both sides load, imports nothing of ours at all."""
    inside = PACKAGE / "sandbox" / "inside"
    for path in [*inside.glob("*.py"), PACKAGE / "sandbox" / "wire.py"]:
        package = ".".join(path.relative_to(ROOT).parent.parts)
        names = {
            n for n in imported_modules(path.read_text(), package) if n.startswith("posttrain")
        }
        allowed = ("posttrain.sandbox.wire", "posttrain.sandbox.inside")
        foreign = {n for n in names if not n.startswith(allowed)} - {"posttrain.sandbox"}
        assert not foreign, path
        assert not names or path.parent == inside, path


def test_a_worker_is_sent_the_wire_and_all_that_runs_inside():
    from posttrain.sandbox import worker

    inside = {path.stem for path in (PACKAGE / "sandbox" / "inside").glob("*.py")} - {"__init__"}
    assert (worker.SHARED_MODULE, set(worker.INSIDE)) == ("wire", inside)


def test_the_rules_see_every_way_to_import():
    source = """
import posttrain.trainers.sft
from . import rl
from ..data import read
def late():
    from posttrain import rollouts
"""
    found = imported_modules(source, "posttrain.trainers")
    assert {
        "posttrain.trainers.sft",
        "posttrain.trainers.rl",
        "posttrain.data.read",
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
