"""A worker's target that asks SymPy to evaluate text, which `algebra_worker` makes impossible."""

import sympy

from posttrain.maths.algebra_worker import warm_up

__all__ = ["sympify_text", "warm_up"]


def sympify_text(text):
    return str(sympy.sympify(text))
