"""A worker's target that asks SymPy to evaluate text, where `algebra` has made that impossible."""

import sympy

from posttrain.maths.algebra import warm_up

__all__ = ["sympify_text", "warm_up"]


def sympify_text(text):
    return str(sympy.sympify(text))
