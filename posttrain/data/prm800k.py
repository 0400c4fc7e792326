"""Parser of PRM800K's own rows: solutions whose steps people rated, with other steps they saw.

    examples = prm800k(Row({"question": {…}, "label": {"steps": […]}}, "phase2_train.jsonl", 1))

The format: https://github.com/openai/prm800k; Lightman et al., arXiv 2305.20050.
"""

from __future__ import annotations

from typing import Any

from posttrain.data.example import DroppedRow, Example
from posttrain.data.parsers import Step, solution_of
from posttrain.data.read import Row


def prm800k(row: Row) -> list[Example]:
    """A solution of PRM800K with all that its labeller rated, each rating once.

    The first example is the solution as it was chosen step by step; each further one is a step that
    was rated and not chosen, behind the steps before it, which are not judged there again. A rating
    of -1 is wrong, 0 (right, but no progress) and 1 are right, and so is a step by the labeller.
    """
    question, label = (_part_of(row, row.values, name, dict) for name in ("question", "label"))
    if label.get("finish_reason") == "bad_problem":
        raise DroppedRow("whose problem its labeller found broken")
    problem = _part_of(row, question, "problem", str, "question.")
    before: list[Step] = []
    found = []
    for place, step in enumerate(_part_of(row, label, "steps", list, "label.")):
        where = f"label.steps[{place}]"
        chosen, others = _rated_steps(row, step, where)
        found += [[*((text, None) for text, _ in before), other] for other in others]
        if chosen is None:  # labelling ended here
            break
        before.append(chosen)
    solutions = [steps for steps in (before, *found) if any(mark is not None for _, mark in steps)]
    if not solutions:
        raise DroppedRow("without a rated step")
    return [solution_of(row, problem, steps) for steps in solutions]


def _rated_steps(row: Row, step: object, where: str) -> tuple[Step | None, list[Step]]:
    """The step that was chosen, None without one, and the others that were rated: (text, mark)."""
    if not isinstance(step, dict):
        raise row.wrong_type(where, step, "an object with completions and chosen_completion")
    ways = [
        _rated(row, way, f"{where}.completions[{i}]")
        for i, way in enumerate(step.get("completions") or [])
    ]
    chosen, own = step.get("chosen_completion"), step.get("human_completion")
    if chosen is None:
        if own is not None:
            text = own if isinstance(own, str) else _part_of(row, own, "text", str, f"{where}.")
            own = (text, True)
        return own, [way for way in ways if way[1] is not None]
    if isinstance(chosen, bool) or not isinstance(chosen, int) or not 0 <= chosen < len(ways):
        name = f"{where}.chosen_completion"
        raise row.wrong_type(name, chosen, f"the place of one of {len(ways)} completions, or null")
    others = [way for i, way in enumerate(ways) if i != chosen and way[1] is not None]
    return ways[chosen], others


def _rated(row: Row, way: object, where: str) -> Step:
    """A step's text, and whether it is right; None where it was not rated, or flagged."""
    text = _part_of(row, way, "text", str, f"{where}.")
    rating = way.get("rating")
    if rating not in (-1, 0, 1, None):
        raise row.wrong_type(f"{where}.rating", rating, "-1, 0, 1 or null")
    return text, None if rating is None or way.get("flagged") else rating >= 0


def _part_of(row: Row, holder: object, name: str, kind: type, path: str = "") -> Any:
    """Return what an object of the row holds under a name; raises DataError for another type."""
    value = holder.get(name) if isinstance(holder, dict) else holder
    if not isinstance(holder, dict) or not isinstance(value, kind):
        words = {dict: "an object", list: "a list", str: "text"}[kind]
        raise row.wrong_type(path + name, value, f"{words}, as in PRM800K")
    return value
