"""Rules for the words and sizes of the code in posttrain/ and recipes/, held over the real tree.

Each test collects every place that breaks its rule, so that one run lists them all.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = sorted((ROOT / "posttrain").rglob("*.py"))
RECIPES = sorted((ROOT / "recipes").rglob("*.py"))

# A sentence that begins so is a clause without its verb: "What is kept", "Whether it ended".
FRAGMENTS = {"What", "Whether", "Of", "How", "Where", "Whose", "Which", "With", "Those"}

# Methods that torch defines and calls (nn.Module, autograd.Function): its documentation says what
# they do.
HOOKS = {"forward", "backward", "setup_context"}

MAX_ANY_SHARE = 0.02
MAX_CONSTRUCTOR_PARAMETERS = 8
MAX_FUNCTION_LINES = 60
MAX_FILE_LINES = 400

Function = ast.FunctionDef | ast.AsyncFunctionDef
Documented = Function | ast.ClassDef | ast.Module


@pytest.fixture(scope="module")
def trees() -> dict[Path, ast.Module]:
    return {path: ast.parse(path.read_text()) for path in [*PACKAGE, *RECIPES]}


def place(path: Path, node: ast.AST) -> str:
    line = getattr(node, "lineno", 1)
    return f"{path.relative_to(ROOT)}:{line} {getattr(node, 'name', '')}".rstrip()


def public(node: ast.Module | ast.ClassDef) -> Iterator[Function | ast.ClassDef]:
    """Functions and classes that a reader may use: at the top, and in public classes."""
    for child in node.body:
        if isinstance(child, Documented) and not child.name.startswith("_"):
            yield child
            if isinstance(child, ast.ClassDef):
                yield from public(child)


def is_hook(node: ast.AST) -> bool:
    """True for a method of HOOKS, and for the second half of a property or an overload."""
    decorators = {ast.unparse(d).rpartition(".")[2] for d in getattr(node, "decorator_list", [])}
    return getattr(node, "name", "") in HOOKS or bool(decorators & {"setter", "overload"})


def parameters(function: Function) -> list[ast.arg]:
    arguments = function.args
    named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    starred = [found for found in (arguments.vararg, arguments.kwarg) if found]
    return [a for a in [*named, *starred] if a.arg not in ("self", "cls")]


def functions(tree: ast.Module) -> list[Function]:
    return [node for node in ast.walk(tree) if isinstance(node, Function)]


def body_lines(function: Function) -> int:
    """Lines of a function without its signature and docstring."""
    body = function.body[1:] if ast.get_docstring(function) else function.body
    return function.end_lineno - body[0].lineno + 1 if body else 0


def test_no_docstring_begins_with_a_fragment(trees):
    found = [
        f"{place(path, node)}: {text.splitlines()[0]}"
        for path, tree in trees.items()
        for node in ast.walk(tree)
        if isinstance(node, Documented) and (text := ast.get_docstring(node))
        if text.split()[0].rstrip(",:;.") in FRAGMENTS
    ]
    assert not found, "\n".join([f"{len(found)} docstrings begin with a fragment", *found])


def test_everything_public_has_a_docstring(trees):
    found = [
        place(path, node)
        for path, tree in trees.items()
        for node in public(tree)
        if not ast.get_docstring(node) and not is_hook(node)
    ]
    assert not found, "\n".join([f"{len(found)} without a docstring", *found])


def test_at_most_two_parameters_in_a_hundred_are_annotated_any(trees):
    everything = [
        (path, function, parameter)
        for path in PACKAGE
        for function in functions(trees[path])
        for parameter in parameters(function)
    ]
    found = [
        f"{place(path, function)}({parameter.arg})"
        for path, function, parameter in everything
        if parameter.annotation and ast.unparse(parameter.annotation) == "Any"
    ]
    share = len(found) / len(everything)
    assert share <= MAX_ANY_SHARE, "\n".join([f"{len(found)} of {len(everything)}", *found])


def test_no_constructor_has_more_than_eight_parameters(trees):
    found = [
        f"{place(path, function)}: {len(parameters(function))}"
        for path, tree in trees.items()
        for function in functions(tree)
        if function.name == "__init__" and len(parameters(function)) > MAX_CONSTRUCTOR_PARAMETERS
    ]
    assert not found, "\n".join(found)


def test_nothing_hides_from_the_formatter(trees):
    found = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in trees
        for number, line in enumerate(path.read_text().splitlines(), start=1)
        if "# fmt: skip" in line
    ]
    assert not found, "\n".join([f"{len(found)} lines with '# fmt: skip'", *found])


def test_all_imports_are_absolute(trees):
    found = [
        place(path, node)
        for path, tree in trees.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.level
    ]
    assert not found, "\n".join(found)


def test_functions_and_files_are_short(trees):
    found = [
        f"{place(path, function)}: {body_lines(function)} lines"
        for path, tree in trees.items()
        for function in functions(tree)
        if body_lines(function) > MAX_FUNCTION_LINES
    ]
    sizes = {path: len(path.read_text().splitlines()) for path in trees}
    found += [
        f"{path.relative_to(ROOT)}: {size} lines"
        for path, size in sizes.items()
        if size > MAX_FILE_LINES
    ]
    assert not found, "\n".join(found)


def test_the_rules_see_what_they_forbid():
    """Each reader finds its own kind, in a file made of nothing else."""
    tree = ast.parse("""
class Open:
    def found(self, x: Any, *, y: int): ...
    def _hidden(self): ...
    def forward(self): ...
class _Closed:
    def found_nowhere(self): ...
""")
    names = [node.name for node in public(tree)]
    assert names == ["Open", "found", "forward"]
    assert [node.name for node in public(tree) if is_hook(node)] == ["forward"]
    found = next(f for f in functions(tree) if f.name == "found")
    assert [a.arg for a in parameters(found)] == ["x", "y"]
    assert body_lines(found) == 1
