"""Splitting test code into what the solution has to compute and what it must not see.

    read_source("assert add(1, 2) == 3").comparisons     # (Comparison("add(1, 2)", "==", 3),)
    read_source("assert sorted(f(1)) == [2]").source     # "assert sorted(_inside('f(1)')) == [2]"

A name that a test uses without binding it, and that is not one of Python's own, is the solution's.
A call of such a name that depends on nothing else is evaluated in the solution's process, as text.
The caller decides a test that only compares such calls with literals. The judge (`judge`) runs all
other tests, with the calls marked for it.
"""

from __future__ import annotations

import ast
import builtins
import functools
import symtable
import sys
from dataclasses import dataclass
from typing import NamedTuple

from posttrain.sandbox.wire import PlainData

INSIDE = "_inside"  # the judge's function that has the solution evaluate an expression
_OPERATORS = {ast.Eq: "==", ast.NotEq: "!=", ast.Is: "is", ast.IsNot: "is not"}


class Comparison(NamedTuple):
    """An assertion that compares an expression, evaluated by the solution, with a literal."""

    expression: str
    operator: str
    expected: PlainData

    def holds(self, value: PlainData) -> bool:
        """Compare with the value, which is plain data, by Python's equality: 1 == 1.0 == True."""
        if self.operator == "==":
            return value == self.expected
        if self.operator == "!=":
            return value != self.expected
        if self.operator == "is":
            return value is self.expected
        return value is not self.expected


@dataclass(frozen=True)
class SourceTest:
    """Test code, ready to be run.

    Attributes:
        preamble: Code to run first: imports, input data, the head of the wanted function.
        source: The test itself, with the calls of the solution marked.
        names: The names that the solution has to provide.
        modules: Modules of the standard library that the test uses without importing them.
        entry_point: A name that belongs to the solution although the preamble binds it.
        comparisons: All assertions of the test, if they can be decided without the judge.
        problem: The reason why it is not a usable test; otherwise "".
    """

    preamble: str = ""
    source: str = ""
    names: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()
    entry_point: str = ""
    comparisons: tuple[Comparison, ...] = ()
    problem: str = ""


@functools.lru_cache(maxsize=4096)  # the same tests judge every completion of a prompt
def read_source(source: str, preamble: str = "", entry_point: str = "") -> SourceTest:
    """Read test code. It is trusted as the data is: parsed here, and run in the sandbox."""
    whole = f"{preamble}\n{source}"
    try:
        body, _ = ast.parse(source), ast.parse(preamble)  # each has to stand alone
        tree = ast.parse(whole)
        scopes = _Scopes.of(whole)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        return SourceTest(problem=f"it cannot be compiled ({error})")
    if not any(isinstance(node, (ast.Assert, ast.Raise)) for node in ast.walk(tree)):
        return SourceTest(problem="it asserts nothing")
    free = scopes.used_globally - scopes.bound_at_top - set(dir(builtins))
    modules = free & sys.stdlib_module_names & _only_attributes(tree)
    names = (free - modules) | ({entry_point} - {""})
    if not names:
        return SourceTest(problem="it calls nothing of the solution")
    marker = _Marker(names, scopes.bound_anywhere | modules)
    comparisons = () if preamble else marker.comparisons(body)
    has_star = any(isinstance(n, ast.alias) and n.name == "*" for n in ast.walk(tree))
    if not has_star:  # with one, the solution's names are not known before the test runs
        body = ast.fix_missing_locations(marker.visit(body))
    return SourceTest(
        preamble,
        ast.unparse(body),
        tuple(sorted(names)),
        tuple(sorted(modules)),
        entry_point,
        comparisons,
    )


@dataclass(frozen=True)
class _Scopes:
    """The names in a piece of code, by how it uses them."""

    used_globally: frozenset[str]
    bound_at_top: frozenset[str]
    bound_anywhere: frozenset[str]

    @classmethod
    def of(cls, source: str, mode: str = "exec") -> _Scopes:
        """Collect the names of a piece of code, those of nested scopes included."""
        top = symtable.symtable(source, "<tests>", mode)
        tables = [top]
        for table in tables:  # grows on the way
            tables += table.get_children()
        return cls(
            frozenset(
                symbol.get_name()
                for table in tables
                for symbol in table.get_symbols()
                if symbol.is_global() or (table is top and symbol.is_referenced())
            ),
            frozenset(map(symtable.Symbol.get_name, filter(_is_bound, top.get_symbols()))),
            frozenset(
                s.get_name() for table in tables for s in filter(_is_bound, table.get_symbols())
            ),
        )


def _is_bound(symbol: symtable.Symbol) -> bool:
    return (
        symbol.is_assigned()
        or symbol.is_imported()
        or symbol.is_parameter()
        or symbol.is_namespace()
    )


def _only_attributes(tree: ast.AST) -> set[str]:
    """Return the names that are only used for their attributes, as in `math.pi`."""
    bases = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
    names = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
    return {n.id for n in names} - {n.id for n in names if id(n) not in bases}


class _Marker(ast.NodeTransformer):
    """Finds the calls that the solution can evaluate by itself, and marks them for the judge."""

    def __init__(self, solution: set[str], elsewhere: frozenset[str]) -> None:
        self._solution = solution
        self._elsewhere = elsewhere  # names that have no meaning in the solution's process

    def visit_Call(self, node: ast.Call) -> ast.AST:
        """Replace a closed call by a call of the judge's function on its text."""
        if not self.is_closed(node) or _is_constructor(node):
            return self.generic_visit(node)
        mark = ast.Name(INSIDE, ast.Load())
        return ast.Call(mark, [ast.Constant(ast.unparse(node))], [])

    def is_closed(self, node: ast.AST) -> bool:
        """Tell whether a node is a call of the solution that depends on nothing of the test."""
        if not (isinstance(node, ast.Call) and _head(node.func) in self._solution):
            return False
        if any(isinstance(part, ast.NamedExpr) for part in ast.walk(node)):
            return False  # the test may use the name afterwards
        return not _Scopes.of(ast.unparse(node), "eval").used_globally & self._elsewhere

    def comparisons(self, body: ast.Module) -> tuple[Comparison, ...]:
        """Return all assertions of a test that consists of simple ones only; otherwise none."""
        found = [self._comparison(statement) for statement in body.body]
        return () if None in found else tuple(filter(None, found))

    def _comparison(self, statement: ast.stmt) -> Comparison | None:
        if not isinstance(statement, ast.Assert):
            return None
        test = statement.test
        is_negated = isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not)
        call = test.operand if is_negated else test
        if self.is_closed(call):  # ask for its truth, which is plain data for any object
            return Comparison(f"not not {ast.unparse(call)}", "==", not is_negated)
        if not (isinstance(test, ast.Compare) and len(test.ops) == 1):
            return None
        operator = _OPERATORS.get(type(test.ops[0]))
        call, expected = test.left, test.comparators[0]
        if not self.is_closed(call):
            call, expected = expected, call
        if operator is None or not self.is_closed(call):
            return None
        return _with_literal(ast.unparse(call), operator, expected)


def _with_literal(call: str, operator: str, expected: ast.expr) -> Comparison | None:
    try:
        value = ast.literal_eval(expected)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return None
    if operator.startswith("is") and not (value is None or isinstance(value, bool)):
        return None  # the identity of other objects is accidental
    return Comparison(call, operator, value)


def _head(function: ast.expr) -> str:
    """Return the name that a call starts from: f, or Solution in Solution().solve; else "".

    A method of a function's result is not called inside the solution: `f(1).startswith("a")` would
    leave the decision to the object.
    """
    while isinstance(function, ast.Attribute):
        function = function.value
    if isinstance(function, ast.Name):
        return function.id
    if isinstance(function, ast.Call):
        name = _head(function.func)
        return name if _makes_object(name) else ""
    return ""


def _makes_object(name: str) -> bool:
    """Take a capitalised name for a class, whose objects and methods stay with the solution."""
    return name[:1].isupper()


def _is_constructor(call: ast.Call) -> bool:
    return isinstance(call.func, ast.Name) and _makes_object(call.func.id)
