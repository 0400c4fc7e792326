"""Test code taken apart: what the solution has to compute, and what is none of its business.

    read_source("assert add(1, 2) == 3").comparisons     # (Comparison("add(1, 2)", "==", 3),)
    read_source("assert sorted(f(1)) == [2]").source     # "assert sorted(_inside('f(1)')) == [2]"

The names that a test uses and neither binds nor finds among Python's own are the solution's. A call
of such a name that depends on nothing else is evaluated in the solution's process, as text; a test
that only compares such calls with literals is decided by the caller. Any other is run by the judge
(`code_judge`), for which the calls are marked.
"""

from __future__ import annotations

import ast
import builtins
import functools
import symtable
import sys
from dataclasses import dataclass
from typing import Any, NamedTuple

INSIDE = "_inside"  # the judge's function that has an expression evaluated by the solution
_OPERATORS = {ast.Eq: "==", ast.NotEq: "!=", ast.Is: "is", ast.IsNot: "is not"}


class Comparison(NamedTuple):
    """An assertion about the value of an expression that the solution evaluates."""

    expression: str
    operator: str
    expected: Any

    def holds(self, value: Any) -> bool:
        """Of plain data, by Python's own equality: 1 == 1.0 == True."""
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
        preamble: Run first: imports, input data, the head of the function that is asked for.
        source: The test itself, calls of the solution marked.
        names: What the solution has to provide.
        modules: Modules of the standard library that are used without an import.
        entry_point: A name that is the solution's although the preamble binds it.
        comparisons: All that the test asserts, if it can be decided without the judge.
        problem: Why it is no test; else empty.
    """

    preamble: str = ""
    source: str = ""
    names: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()
    entry_point: str = ""
    comparisons: tuple[Comparison, ...] = ()
    problem: str = ""


@functools.lru_cache(maxsize=4096)  # the same tests judge each answer of a group, step after step
def read_source(source: str, preamble: str = "", entry_point: str = "") -> SourceTest:
    """Test code as a SourceTest. Trusted as data is: it is parsed here, and run in the sandbox."""
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
    if not has_star:  # else nobody knows which names are the solution's before it runs
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
    """Names of a piece of code, by what it does with them."""

    used_globally: frozenset[str]
    bound_at_top: frozenset[str]
    bound_anywhere: frozenset[str]

    @classmethod
    def of(cls, source: str, mode: str = "exec") -> _Scopes:
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
    """Names that are used as in `math.pi`, and in no other way."""
    bases = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
    names = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
    return {n.id for n in names} - {n.id for n in names if id(n) not in bases}


class _Marker(ast.NodeTransformer):
    """Finds the calls that the solution can evaluate by itself, and marks them for the judge."""

    def __init__(self, solution: set[str], elsewhere: frozenset[str]) -> None:
        self._solution = solution
        self._elsewhere = elsewhere  # what names outside of a call mean is not known inside

    def visit_Call(self, node: ast.Call) -> ast.AST:
        if not self.is_closed(node) or _is_constructor(node):
            return self.generic_visit(node)
        mark = ast.Name(INSIDE, ast.Load())
        return ast.Call(mark, [ast.Constant(ast.unparse(node))], [])

    def is_closed(self, node: ast.AST) -> bool:
        """A call of the solution's that depends on nothing of the test."""
        if not (isinstance(node, ast.Call) and _head(node.func) in self._solution):
            return False
        if any(isinstance(part, ast.NamedExpr) for part in ast.walk(node)):
            return False  # the test wants the name afterwards
        return not _Scopes.of(ast.unparse(node), "eval").used_globally & self._elsewhere

    def comparisons(self, body: ast.Module) -> tuple[Comparison, ...]:
        """All its assertions, if it consists of simple ones only; else none."""
        found = [self._comparison(statement) for statement in body.body]
        return () if None in found else tuple(filter(None, found))

    def _comparison(self, statement: ast.stmt) -> Comparison | None:
        if not isinstance(statement, ast.Assert):
            return None
        test = statement.test
        is_negated = isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not)
        call = test.operand if is_negated else test
        if self.is_closed(call):  # its truth is asked for, since that of any object is plain data
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
        return None  # identity of other objects is an accident
    return Comparison(call, operator, value)


def _head(function: ast.expr) -> str:
    """The name from which what is called comes: f, Solution in Solution().solve; "" for others.

    A method of what a function returned is none of the solution's: `f(1).startswith("a")` would
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
    """By its capital, a class: its objects stay with the solution, and so do their methods."""
    return name[:1].isupper()


def _is_constructor(call: ast.Call) -> bool:
    return isinstance(call.func, ast.Name) and _makes_object(call.func.id)
