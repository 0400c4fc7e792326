"""What algebra decides in its process, exactly, and that it evaluates no text there."""

import pytest

from posttrain.maths.algebra_pool import Pair, ask_algebra, pool
from posttrain.workers.pool import WorkerPool

COLUMN = r"\begin{pmatrix}1\\2\end{pmatrix}"


@pytest.mark.parametrize(
    ("kind", "gold", "answer", "status"),
    [
        ("value", "(x+1)^2", "x^2+2x+1", "equal"),
        ("value", "x", "y", "different"),
        ("value", r"\frac{1}{2^{99}}", r"\frac{1}{2^{98}}", "different"),
        ("value", "0.3333333", r"\frac{1}{3}", "different"),
        ("value", r"1 + 10^{-60}", "1", "different"),
        ("value", "1", r"-i\infty", "different"),
        ("value", "0.1x", r"\frac{x}{10}", "equal"),
        ("value", r"\sqrt{x^2}", "x", "different"),
        ("value", r"\sqrt{x^2}", "|x|", "equal"),
        ("value", r"\ln(x^2)", r"2\ln x", "equal"),
        ("value", r"\sin^2 x + \cos^2 x", "1", "equal"),
        ("value", r"\frac{x^2-1}{x-1}", "x+1", "equal"),
        ("value", "(1+i)^2", "2i", "equal"),
        ("value", r"e^{i\pi}", "-1", "equal"),
        ("value", "f(x)", "f(y)", "different"),
        ("value", "f(x) + 1", "1 + f(x)", "equal"),
        ("value", r"\frac{1}{0}", r"\frac{2}{0}", "different"),
        ("value", r"\int_0^1 x dx", r"\frac{1}{2}", "equal"),
        ("value", r"\}{", "1", "gold unreadable"),
        ("value", "1", r"\}{", "different"),
        ("equation", "x + y = 1", "2x + 2y - 2 = 0", "equal"),
        ("equation", "x + y = 1", "x + y = 2", "different"),
        ("equation", "1 = 2", "3 = 4", "different"),
        ("inequality", "x < 1", "-x > -1", "equal"),
        ("inequality", "x < 1", "-x < -1", "different"),
        ("inequality", "2x < 4", r"x \le 2", "different"),
        ("matrix", COLUMN, COLUMN.replace("1", r"\frac{2}{2}"), "equal"),
        ("matrix", COLUMN, r"\begin{pmatrix}1&2\end{pmatrix}", "different"),
        ("set", r"\mathbb{R}", r"(-\infty, \infty)", "equal"),
        ("set", r"\mathbb{R} \setminus \{0\}", r"(-\infty, 0) \cup (0, \infty)", "equal"),
        ("set", r"\mathbb{R} \setminus \{0\}", r"(-\infty, 0) \cup (1, \infty)", "different"),
    ],
)  # fmt: skip
def test_algebra_decides_exactly(kind, gold, answer, status):
    assert ask_algebra((Pair(kind, gold, answer),)) == (status,)


def test_a_decimal_is_held_to_the_decimals_that_it_shows():
    assert ask_algebra((Pair("value", r"\sqrt{2}", "1.414213562373095", 15),)) == ("equal",)
    assert ask_algebra((Pair("value", r"\sqrt{2}", "1.414213562373094", 15),)) == ("different",)


@pytest.fixture(scope="module")
def guarded():
    guarded = WorkerPool("tests.rewards.guarded_sympy:sympify_text")
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
