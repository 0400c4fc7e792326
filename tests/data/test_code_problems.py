"""The shipped code problems: their solutions pass, and what only looks like one does not."""

import ast
import json
from pathlib import Path

from posttrain.data import load_prompts
from posttrain.programs.tests import find_broken
from posttrain.rewards.code import code_reward, judge_code, shared_sandbox

FILE = Path(__file__).parents[2] / "data" / "code_problems.jsonl"
PROBLEMS = [json.loads(line) for line in FILE.read_text(encoding="utf-8").splitlines()]
TESTS = [problem["tests"] for problem in PROBLEMS]


def test_there_are_enough_problems_of_both_kinds_with_several_tests_each():
    assert len(PROBLEMS) >= 64
    assert len({problem["question"] for problem in PROBLEMS}) == len(PROBLEMS)
    programs = [tests for tests in TESTS if "stdin" in tests[0]]
    assert 20 <= len(programs) <= len(PROBLEMS) - 20
    assert min(map(len, TESTS)) >= 4
    assert find_broken(TESTS) == []


def test_every_solution_passes_all_its_tests():
    solutions = [f"```python\n{problem['solution']}```" for problem in PROBLEMS]
    assert code_reward(solutions, tests=TESTS) == [1.0] * len(PROBLEMS)


class Misread(ast.NodeTransformer):
    """Every integer in the code is one more than it should be."""

    def visit_Constant(self, node):
        is_int = isinstance(node.value, int) and not isinstance(node.value, bool)
        return ast.Constant(node.value + 1) if is_int else node


def test_a_solution_whose_numbers_are_off_by_one_solves_nothing():
    trees = [ast.parse(problem["solution"]) for problem in PROBLEMS]
    wrong = [ast.unparse(Misread().visit(ast.parse(ast.unparse(tree)))) for tree in trees]
    changed = [i for i, tree in enumerate(trees) if wrong[i] != ast.unparse(tree)]
    assert len(changed) > len(PROBLEMS) / 2
    rewards = code_reward([wrong[i] for i in changed], tests=[TESTS[i] for i in changed])
    assert rewards == [0.0] * len(changed)


def hard_coded(problem):
    """A program that gives what the first test wants, whatever it is given."""
    first = problem["tests"][0]
    if "stdin" in first:
        return f"print({first['stdout']!r}, end='')"
    comparison = ast.parse(first["assert"]).body[-1].test
    call, value = comparison.left, comparison.comparators[0]
    if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id != "abs":
        return f"def {call.func.id}(*_):\n    return {ast.unparse(value)}\n"
    return ""


def test_the_answer_to_the_first_test_solves_nothing():
    programs = [hard_coded(problem) for problem in PROBLEMS]
    written = [i for i, program in enumerate(programs) if program]
    assert len(written) > 0.9 * len(PROBLEMS)
    assert code_reward([programs[i] for i in written], tests=[TESTS[i] for i in written]) == [
        0.0
    ] * len(written)
    # It is the right answer to that test.
    for i in written[::8]:
        assert judge_code(programs[i], TESTS[i][:1], shared_sandbox()).score == 1.0


def test_a_prompt_holds_the_question_alone_and_its_tests_come_beside_it(tokenizer, quiet):
    prompts = load_prompts(FILE, tokenizer, template="plain", max_prompt_length=4096, say=quiet)
    assert [text.strip() for text in prompts["prompt"]] == [p["question"] for p in PROBLEMS]
    some = prompts.select(range(0, len(PROBLEMS), 8))
    assert code_reward(some["solution"], tests=some["tests"]) == [1.0] * len(some)
    assert code_reward(["pass"] * len(some), tests=some["tests"]) == [0.0] * len(some)
