"""Texts that try to hang, crash or fool the verifier, and every gold of GSM8K."""

import json
import os
import time
from pathlib import Path

import pytest

from posttrain.maths import algebra_pool
from posttrain.rewards.math import MAX_ANSWER_CHARS, check_golds, verify_math
from tests.rewards.hostile import hostile_texts
from tests.rewards.processes import descendants

GSM8K = Path(__file__).parents[3] / "shared" / "data" / "gsm8k"
NUM_HOSTILE = 400
HARD_LIMIT_SECONDS = 3.5

HOSTILE_UNITS = [
    "{", "}", r"\boxed{", r"\boxed{1}", r"\text{", "<think>", "</think>", "<answer>", "</answer>",
    "<answer></answer>", "\\", "^{", r"\frac", r"\frac{", r"\sqrt(", r"\{", "####", "9", "9,", "9 ",
    "9**", " ", "½", "²x", "\ufdfa", "\ud800", "-", "a ", "1 a", ",", " or ", r"\cup ", "=", "x=",
    "$",
]  # fmt: skip


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
    assert time.process_time() - start < 0.4


def test_hostile_answers_are_wrong_in_bounded_time_and_leave_no_process():
    algebra_pool.pool.close()
    before = set(descendants(os.getpid()))
    verify_math("x + 201", r"\boxed{201 + x}")  # the start of the workers is not what is timed
    for gold, answer in hostile_texts(NUM_HOSTILE, seed=3):
        start = time.monotonic()
        score, reason = verify_math(gold, rf"\boxed{{{answer}}}")
        assert time.monotonic() - start < HARD_LIMIT_SECONDS, (gold, answer)
        assert score == 0.0 or answer == gold, (gold, answer, reason)
    algebra_pool.pool.close()
    assert set(descendants(os.getpid())) <= before


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
        rf"\frac{{{number}}}{{7}} + 1000000",
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


def test_every_gsm8k_answer_is_right_in_ten_rewritings_and_wrong_in_ten_near_misses():
    """Each number that is an answer there, once."""
    golds = {int(gold.rpartition("#### ")[2].replace(",", "")): gold for gold in gsm8k_golds()}
    assert len(golds) > 900
    for number, gold in golds.items():
        for answer in rewritings(number):
            assert verify_math(gold, rf"\boxed{{{answer}}}").score == 1.0, (number, answer)
        for answer in near_misses(number):
            assert verify_math(gold, rf"\boxed{{{answer}}}").score == 0.0, (number, answer)
