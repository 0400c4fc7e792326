"""Which answers count as right: a table, hostile texts, and every GSM8K gold."""

import json
import time
from fractions import Fraction
from functools import partial
from pathlib import Path

import pytest

from posttrain.rewards.extraction import boxed, extract_answers
from posttrain.rewards.math import MAX_ANSWER_CHARS, math_reward, read_gold, verify_math
from posttrain.rewards.normalise import normalise
from posttrain.rewards.numerals import read_number

GSM8K = Path(__file__).parents[3] / "shared" / "data" / "gsm8k"


def answered(answer):
    return f"<think>some thought</think><answer>{answer}</answer>"


SAME_ANSWERS = [
    ("18", "18"),
    ("18", "18."),
    ("3", "3."),
    ("18", " 18\n"),
    ("18", "+18"),
    ("18", "018"),
    ("18", "18.00"),
    ("18", "１８"),
    ("18", "$18"),
    ("18", r"\$18"),
    ("18", "$18$"),
    ("18", r"\(18\)"),
    ("18", r"\boxed{18}"),
    ("18", r"so it is \boxed{18} in all"),
    ("18", r"\boxed{\boxed{18}}"),
    ("18", r"\boxed{18} and again \boxed{18.0}"),
    ("18", r"\boxed{{{18}}}"),
    ("18", r"\text{18}"),
    ("18", r"\mathbf{18}."),
    ("18", "36/2"),
    ("18", "1.8e1"),
    ("18", "1800%"),
    ("1000", "1,000"),
    ("1,000", "1000"),
    ("1000000", "1,000,000.0"),
    ("1000", r"1{,}000"),
    ("1000", r"1,\!000"),
    ("1000", r"1\,000"),
    ("1000", "1\u202f000"),
    ("-5", "\u22125"),
    ("-5", "\u20115"),
    ("-5", "\u20125"),
    ("-5", "\u20135"),
    ("-5", "－5"),
    ("-5", "- 5"),
    ("-5", "-$5"),
    ("0", "-0"),
    ("0", "0.000"),
    ("1/2", "0.5"),
    ("0.5", ".5"),
    ("0.5", r"\frac{1}{2}"),
    ("0.5", r"\dfrac12"),
    ("0.5", r"\tfrac{{1}}{{2}}"),
    ("0.5", "½"),
    ("0.5", "1\u22152"),
    ("0.5", "50%"),
    ("0.5", r"50\%"),
    ("50%", "1/2"),
    ("-1/2", r"\frac{-1}{2}"),
    ("-1/2", r"-\frac{1}{2}"),
    ("-1/2", "1/-2"),
    ("1.5", "1 1/2"),
    ("1.5", r"1\frac{1}{2}"),
    ("1.5", "1½"),
    ("-1.5", "-1 1/2"),
    ("1.5", r"1\,\frac{1}{2}"),
    ("1/3", "2/6"),
    ("1500", r"1.5 \times 10^{3}"),
    ("1500", "1.5 × 10³"),
    ("1500", "1.5 · 10³"),
    ("1500", "1.5 ⋅ 10³"),
    ("1500", r"1.5\cdot10^3"),
    ("1500", "1.5*10^3"),
    ("0.001", "10^{-3}"),
    ("0.001", "10⁻³"),
    (r"x^{2}+1", "x^2 + 1"),
    (r"x\,+\quad 1", "x + 1"),
    (r"\left( 3, \frac{\pi}{2} \right)", r"(3,\dfrac{\pi}{2})"),
    ("B", r"\text{B}"),
    ("x²", "x^2"),
    ("9**9**9", "9**9**9"),
    ("... so he has 9 + 9 = <<9+9=18>>18 left.\n#### 18", "18"),
    ("It follows that the sum is \\boxed{\\frac{1}{2}}.", "0.5"),
    (18, "18"),
    (0.5, "1/2"),
]

DIFFERENT_ANSWERS = [
    ("18", "19"),
    ("18", "-18"),
    ("18", "180"),
    ("18", "1.8"),
    ("18", "18.0000000000000000000001"),
    ("18", "18%"),
    ("50", "50%"),
    ("18", "17, 18"),
    ("18", "17 or 18"),
    ("18", "18, 18"),
    ("18", "x > 18"),
    ("18", r"\geq 18"),
    ("18", r"\pm 18"),
    ("18", r"\{17, 18\}"),
    ("18", "[17, 18]"),
    ("18", "17-18"),
    ("18", "1 8"),
    ("18", "18_7"),
    ("18", "１８²"),
    ("52", "5²"),
    ("52", "5₂"),
    ("18", "18!"),
    ("18", "18 apples"),
    ("18", "the answer is 18"),
    ("18", r"\boxed{17} \boxed{18}"),
    ("18", r"\boxed{18} \boxed{17}"),
    ("18", r"\boxed{17, 18}"),
    ("18", r"\boxed{} and 18"),
    ("18", ""),
    ("18", "   "),
    ("18", "--18"),
    ("1234", "1, 234"),
    ("1234", "12,34"),
    ("0.123", "0,123"),
    ("123", "0,123"),
    ("11/2", "1½"),
    ("3.5", "2 3/2"),
    ("0", "1/0"),
    ("1/0", "0"),
    ("A", "a"),
    ("A", "A or B"),
    ("12", r"1\ 2"),
    ("8", "2^3"),
    ("2", "__import__('os').getpid() and 2"),
]


@pytest.mark.parametrize(("gold", "answer"), SAME_ANSWERS)
def test_the_same_answer_written_differently_is_right(gold, answer):
    assert verify_math(gold, answered(answer)).score == 1.0


@pytest.mark.parametrize(("gold", "answer"), DIFFERENT_ANSWERS)
def test_another_answer_is_wrong(gold, answer):
    assert verify_math(gold, answered(answer)).score == 0.0


UNREADABLE_GOLDS = ["", "  ", "$$", "nothing follows ####", None, ["18"], "7" * 9_999]


@pytest.mark.parametrize("gold", UNREADABLE_GOLDS)
def test_an_unreadable_gold_has_no_score_and_says_so(gold):
    score, reason = verify_math(gold, answered("18"))
    assert score is None
    assert "gold cannot be read" in reason


@pytest.mark.parametrize(
    ("completion", "score"),
    [
        (answered("18"), 1.0),
        (r"<think>t</think> \boxed{18}", 1.0),
        (r"\boxed{18}", 1.0),
        ("<answer>17</answer><answer>18</answer>", 1.0),
        ("<answer>18</answer><answer>17</answer>", 0.0),
        ("<answer>18", 0.0),
        ("18</answer>", 0.0),
        ("</answer>18<answer>", 0.0),
        (r"<answer>17</answer> \boxed{18}", 0.0),
        (r"<think>\boxed{18}", 0.0),
        (r"<think><answer>18</answer>", 0.0),
        (r"<think>\boxed{18}</think> no idea", 0.0),
        (r"<think>a</think><answer>18</answer><think>but", 0.0),
        (r"<think>a</think>\boxed{17}<think>b</think>\boxed{18}", 1.0),
        (r"\boxed{18", 0.0),
        (r"\boxed{18} then \boxed{1", 1.0),
        (r"\\boxed{18}", 0.0),
        ("18", 0.0),
        ("#### 18", 0.0),
        ("", 0.0),
    ],
)
def test_the_answer_stands_after_the_thought_and_in_its_place(completion, score):
    assert verify_math("18", completion).score == score


def test_a_prefilled_thought_must_be_closed_before_anything_counts():
    inside = r"so \boxed{18}"
    assert verify_math("18", inside).score == 1.0
    assert verify_math("18", inside, prefilled_think=True).score == 0.0
    assert verify_math("18", "so</think><answer>18</answer>", prefilled_think=True).score == 1.0


@pytest.mark.parametrize(
    ("options", "completion", "score"),
    [
        ({"allow_hashes": True}, "9 + 9 = 18\n#### 18\nQuestion: 3", 1.0),
        ({"allow_hashes": True}, "#### 18 #### 17", 0.0),
        ({"allow_hashes": True}, r"\boxed{17} #### 18", 0.0),
        ({"allow_hashes": True}, "it is 18", 0.0),
        ({"allow_last_number": True}, "9 + 9 makes $18.", 1.0),
        ({"allow_last_number": True}, "it is 18 for 3 people", 0.0),
        ({"allow_last_number": True}, "1,000 less 982 is 21-3 = 18", 1.0),
        ({"allow_last_number": True}, answered("that is 18 apples"), 1.0),
        ({"allow_last_number": True}, r"\boxed{17} not 18", 0.0),
        ({"allow_last_number": True}, "no number", 0.0),
        ({"allow_last_number": True}, "<think>18", 0.0),
    ],
)
def test_lenient_modes_look_where_nothing_is_boxed(options, completion, score):
    assert verify_math("18", completion, **options).score == score


def test_the_last_number_keeps_its_sign_but_takes_no_minus_from_a_difference():
    options = {"allow_last_number": True}
    assert verify_math("-3", "x is -3", **options).score == 1.0
    assert verify_math("3", "5-3", **options).score == 1.0


@pytest.mark.parametrize(
    ("completion", "reason"),
    [
        (answered("18.0"), "equal numbers"),
        (answered("19"), "different numbers"),
        (answered("17 or 18"), "not one value"),
        (answered("2 * 9"), "not decided: differs as text"),
        (r"\boxed{1}\boxed{2}", "several boxes that differ"),
        ("<think>18", "no answer: <think> is not closed"),
        ("<answer>18", "no answer: <answer> is not closed, or not opened"),
        ("18", r"no answer: no <answer> and no \boxed{}"),
        (answered(" "), "no answer: empty"),
        (answered("9" * 3_000), f"refused: over {MAX_ANSWER_CHARS} characters"),
    ],
)
def test_the_verdict_names_the_rule_that_decided(completion, reason):
    assert verify_math("18", completion).reason == reason


@pytest.mark.parametrize(
    ("text", "bodies"),
    [
        (r"\boxed{a}\boxed{b}", ["a", "b"]),
        (r"\boxed{\frac{1}{2}}", [r"\frac{1}{2}"]),
        (r"\boxed{\{1, 2\}}", [r"\{1, 2\}"]),
        (r"\boxed{a \boxed{b} c}", [r"a \boxed{b} c"]),
        (r"\boxed{a \boxed{b}", ["b"]),
        (r"}}} \boxed {a}", ["a"]),
        (r"\fbox{a} {b}", ["a"]),
        (r"\boxed a", []),
    ],
)
def test_boxes_are_found_by_counting_braces(text, bodies):
    assert boxed(text) == bodies


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("007", Fraction(7)),
        ("1,234.5", Fraction(2469, 2)),
        ("33 1/3%", Fraction(1, 3)),
        ("2.5E-2", Fraction(1, 40)),
        ("1e1000", Fraction(10**1000)),
        ("1e1001", None),
        ("1e999999999999", None),
        ("10^{99999}", None),
        ("9" * 300, Fraction(10**300 - 1)),
        ("9" * 301, None),
        ("9**9**9", None),
        ("9^9^9", None),
        ("1/0", None),
        (".", None),
        ("-", None),
        ("", None),
        ("%", None),
        ("inf", None),
        ("nan", None),
        ("1_000", None),
        ("٣", None),
    ],
)
def test_numerals_are_read_exactly_or_not_at_all(text, value):
    assert read_number(text) == value


@pytest.mark.parametrize(
    ("text", "spelling"),
    [
        (r"$\dfrac12$.", r"\frac{1}{2}"),
        (r"{{ x }}", "x"),
        (r"{a}{b}", "{a}{b}"),
        ("0.333...", "0.333..."),
        ("10⁻³", "10^{-3}"),
        ("x₁", "x_1"),
    ],
)
def test_normalising_gives_one_spelling(text, spelling):
    assert normalise(text) == spelling


HOSTILE_UNITS = [
    "{",
    "}",
    r"\boxed{",
    r"\boxed{1}",
    r"\text{",
    "<think>",
    "</think>",
    "<answer>",
    "</answer>",
    "<answer></answer>",
    "\\",
    "^{",
    r"\frac",
    "####",
    "9",
    "9,",
    "9**",
    " ",
    "½",
    "²x",
    "\ufdfa",
    "\ud800",
    "-",
]


@pytest.mark.parametrize("unit", HOSTILE_UNITS)
@pytest.mark.parametrize("frame", ["{}", "<answer>{}</answer>", r"\boxed{{{}}}", r"\boxed{{{}"])
def test_a_megabyte_of_anything_is_judged_at_once(unit, frame):
    text = frame.format(unit * (1_000_000 // len(unit)))
    start = time.process_time()
    verdict = verify_math("18", text, allow_hashes=True, allow_last_number=True)
    assert verdict.score == 0.0
    assert time.process_time() - start < 0.5


@pytest.mark.parametrize("unit", HOSTILE_UNITS)
def test_the_longest_answer_that_is_read_is_judged_at_once(unit):
    text = unit * (MAX_ANSWER_CHARS // len(unit))
    start = time.process_time()
    assert verify_math("18", rf"\boxed{{{text}}}").score == 0.0
    verify_math(text, rf"\boxed{{{text}}}")
    assert time.process_time() - start < 0.2


def gsm8k_golds():
    files = [GSM8K / "train.jsonl", GSM8K / "test.jsonl"]
    if not all(file.exists() for file in files):
        pytest.skip(f"GSM8K is not at {GSM8K}")
    return [json.loads(line)["answer"] for file in files for line in file.open(encoding="utf-8")]


def test_every_gsm8k_gold_verifies_against_itself_and_not_against_a_neighbour():
    golds = gsm8k_golds()
    assert len(golds) == 8_792
    for gold in golds:
        final = gold.rpartition("#### ")[2]
        number = int(final.replace(",", ""))
        assert verify_math(gold, answered(final)).score == 1.0
        assert verify_math(gold, rf"\boxed{{{number}}}").score == 1.0
        assert verify_math(gold, gold, allow_hashes=True).score == 1.0
        assert verify_math(gold, answered(number + 1)).score == 0.0
        assert read_gold(gold) == final


def test_the_reward_reads_texts_and_chat_messages_alike():
    """TRL calls by keyword, with more keywords than a reward asks for."""
    texts = [answered("18"), answered("19"), answered("18")]
    chats = [[{"role": "assistant", "content": text}] for text in texts]
    others = {
        "prompts": ["p"] * 3,
        "completion_ids": [[1]] * 3,
        "trainer_state": object(),
        "log_extra": print,
        "log_metric": print,
    }
    golds = ["18", "18", ""]
    assert math_reward(completions=texts, answer=golds, **others) == [1.0, 0.0, None]
    assert math_reward(completions=chats, answer=golds, **others) == [1.0, 0.0, None]


def test_the_last_message_of_a_conversation_is_judged():
    parts = [{"type": "text", "text": r"\boxed{1"}, {"type": "text", "text": "8}"}]
    chat = [
        {"role": "assistant", "content": r"\boxed{17}"},
        {"role": "user", "content": "Sure?"},
        {"role": "assistant", "content": parts},
    ]
    silent = [{"role": "assistant", "content": None}]
    assert math_reward([chat, silent, []], answer=["18"] * 3) == [1.0, 0.0, 0.0]


def test_options_of_the_reward_can_be_bound():
    lenient = partial(math_reward, allow_last_number=True)
    assert lenient(["18 it is"], answer=["18"]) == [1.0]
    assert extract_answers("18 it is").answers == []
