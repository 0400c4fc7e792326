"""Texts that try to hang, crash or fool the verifier, and every gold of GSM8K."""

import json
import os
from pathlib import Path

import pytest

from posttrain.maths import algebra
from posttrain.rewards.math import MAX_ANSWER_CHARS, check_golds, verify_math
from tests.cases import read_cases
from tests.deadline import deadline
from tests.processes import descendants
from tests.rewards.hostile import hostile_texts

GSM8K = Path(__file__).parents[3] / "shared" / "data" / "gsm8k"
NUM_HOSTILE = 400
GENEROUS_SECONDS = 30.0  # a text takes milliseconds, or three seconds of algebra; a hang, hours
UNITS = [case["text"] for case in read_cases(__file__, "math_hostile", kind="unit")]


@pytest.mark.parametrize("frame", ["{}", "<answer>{}</answer>", r"\boxed{{{}}}", r"\boxed{{{}"])
def test_a_long_text_of_anything_is_judged_and_never_hangs(frame):
    """Long enough that quadratic work on it would take minutes."""
    for unit in UNITS:
        text = frame.format(unit * (250_000 // len(unit)))
        with deadline(GENEROUS_SECONDS, unit):
            verdict = verify_math("18", text, allow_hashes=True, allow_last_number=True)
        assert verdict.score == 0.0, unit


def test_the_longest_answer_that_is_read_is_judged_and_never_hangs():
    for unit in UNITS:
        text = unit * (MAX_ANSWER_CHARS // len(unit))
        with deadline(GENEROUS_SECONDS, unit):
            assert verify_math("18", rf"\boxed{{{text}}}").score == 0.0, unit
            verify_math(text, rf"\boxed{{{text}}}")


@pytest.mark.parametrize(
    "answer",
    [
        "__import__('os').system('touch {marker}')",
        "open('{marker}', 'w')",
        r"\text{{exec}}(open('{marker}', 'w'))",
        "().__class__.__base__.__subclasses__()[0] + open('{marker}','w')",
        r"\operatorname{{open}}('{marker}', 'w')",
        "5 + exec(\"open('{marker}', 'w')\")",
    ],
)
def test_code_in_an_answer_or_a_gold_is_never_run(answer, tmp_path):
    marker = tmp_path / "ran"
    code = answer.format(marker=marker)
    assert verify_math("5", rf"\boxed{{{code}}}").score == 0.0
    verify_math(code, r"\boxed{5}")
    verify_math(code, rf"\boxed{{{code} + 1}}")
    assert not marker.exists()


def rewritings(number):
    return [
        f"{number}",
        f"{number:,}",
        f"{number}.0",
        f"{number}.",
        f"${number}$",
        rf"\text{{{number}}}",
        f"{number} dollars",
        rf"\frac{{{2 * number}}}{{2}}",
        f"x = {number}",
        rf"{number}.00\text{{ units}}",
    ]


def near_misses(number):
    return [
        f"{number + 1}",
        f"{number - 1}",
        f"{10 * number + 5}",
        f"{number}1",
        f"{number}.5",
        f"x > {number}",
        f"{number} or {number + 1}",
        rf"\pm {number + 7}",
        f"[{number}, {number + 2}]",
    ]


def gsm8k_golds():
    files = [GSM8K / "train.jsonl", GSM8K / "test.jsonl"]
    if not all(file.exists() for file in files):
        pytest.skip(f"GSM8K is not at {GSM8K}")
    return [json.loads(line)["answer"] for file in files for line in file.open(encoding="utf-8")]


def test_every_gsm8k_gold_verifies_against_itself_and_its_own_last_line():
    golds = gsm8k_golds()
    assert len(golds) == 8_792
    assert check_golds(golds) == []
    assert all(verify_math(gold, gold, allow_hashes=True).score == 1.0 for gold in golds)


def test_every_gsm8k_answer_is_right_in_its_rewritings_and_wrong_in_near_misses():
    """Each number that is an answer there, once, in every second form, by turns.

    Every fiftieth is in a near miss that takes algebra, too.
    """
    golds = {int(gold.rpartition("#### ")[2].replace(",", "")): gold for gold in gsm8k_golds()}
    assert len(golds) > 900
    for turn, (number, gold) in enumerate(golds.items()):
        for answer in rewritings(number)[turn % 2 :: 2]:
            assert verify_math(gold, rf"\boxed{{{answer}}}").score == 1.0, (number, answer)
        for_algebra = [rf"\frac{{{number}}}{{7}} + 1000000"] if turn % 50 == 0 else []
        for answer in near_misses(number)[turn % 2 :: 2] + for_algebra:
            assert verify_math(gold, rf"\boxed{{{answer}}}").score == 0.0, (number, answer)


def test_hostile_answers_are_wrong_in_bounded_time_and_leave_no_process():
    before = set(descendants(os.getpid()))
    for gold, answer in hostile_texts(NUM_HOSTILE, seed=3):
        with deadline(GENEROUS_SECONDS, (gold, answer)):
            score, reason = verify_math(gold, rf"\boxed{{{answer}}}")
        assert score == 0.0 or answer == gold, (gold, answer, reason)
    algebra.pool.close()
    assert set(descendants(os.getpid())) <= before
