"""What algebra decides in its process, exactly, and that it evaluates no text there."""

import pytest

from posttrain.maths.algebra import Pair, ask_algebra, pool
from posttrain.workers.pool import WorkerPool
from tests.cases import read_cases


def test_algebra_decides_exactly():
    cases = read_cases(__file__, "algebra")
    answers = [ask_algebra((Pair(c["kind"], c["gold"], c["answer"]),)) for c in cases]
    wrong = [(c, a) for c, a in zip(cases, answers, strict=True) if a != (c["status"],)]
    assert wrong == []


def test_a_decimal_is_held_to_the_decimals_that_it_shows():
    assert ask_algebra((Pair("value", r"\sqrt{2}", "1.414213562373095", 15),)) == ("equal",)
    assert ask_algebra((Pair("value", r"\sqrt{2}", "1.414213562373094", 15),)) == ("different",)


@pytest.fixture(scope="module")
def guarded():
    guarded = WorkerPool("tests.maths.guarded_sympy:sympify_text")
    yield guarded
    guarded.close()


@pytest.mark.parametrize(
    "text", ["__import__('os').getpid()", "1+1", "x", "[].append(1)", "exit()", "'5'*9"]
)
def test_sympy_cannot_evaluate_text_in_a_worker(guarded, text):
    """`sympify`, which evaluates its text, is itself called there, after the same warm-up."""
    reply = guarded.call(text, timeout_seconds=10)
    assert reply.problem == "raised"
    assert "not evaluated here" in reply.detail or "SympifyError" in reply.detail


def test_sympy_reads_numerals_in_a_worker(guarded):
    values = [guarded.call(text, timeout_seconds=10).value for text in ("12", "1.5")]
    assert values[0] == "12"
    assert float(values[1]) == 1.5


def test_an_endless_question_ends_and_the_next_one_is_answered():
    reply = pool.call([["value", r"\int_0^1 x^{x^{x^x}} dx", "2", None]], timeout_seconds=0.5)
    assert reply.problem == "timeout"
    assert ask_algebra((Pair("value", "7 + z", "z + 7"),)) == ("equal",)
