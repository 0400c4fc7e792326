"""From runs to figures: medians, ratios, and the refusal to compare unlike work."""

import pytest

from benchmarks.report import (
    DisagreementError,
    check_agreement,
    markdown,
    ratio,
    section,
    summarise,
    table,
)


def run(cpu: float, *, wall: float = 1.0, peak: float = 1.0, loss: float = 2.0) -> dict:
    return {
        "cpu_seconds": cpu,
        "wall_seconds": wall,
        "peak_gb": peak,
        "first": {"loss": loss, "grad_norm": 1.0},
    }


def test_a_ratio_is_of_the_medians_with_the_range_of_the_rounds():
    """By hand: medians 2 and 6 give 3; the rounds 4/1, 6/2, 20/4 give 4, 3, 5."""
    assert ratio([1.0, 2.0, 4.0], [4.0, 6.0, 20.0]) == {"ratio": 3.0, "low": 3.0, "high": 5.0}


def test_every_side_is_compared_with_ours():
    runs = {"ours": [run(1.0), run(2.0), run(9.0)], "peer_best": [run(3.0, peak=5.0)] * 3}
    summary = summarise(runs)
    assert summary["medians"]["ours"]["cpu_seconds"] == 2.0
    assert summary["ratios"]["peer_best"]["cpu_seconds"]["ratio"] == 1.5
    assert summary["ratios"]["peer_best"]["peak_gb"]["ratio"] == 5.0
    assert "ours" not in summary["ratios"]


def test_sides_whose_first_steps_differ_are_not_reported():
    runs = {"ours": [run(1.0)], "peer_usual": [run(3.0, loss=2.0005)]}
    with pytest.raises(DisagreementError, match=r"loss: peer_usual says 2\.0005, ours 2;"):
        check_agreement(runs, dtype="float32")
    gaps = check_agreement(runs, dtype="bfloat16")  # which rounds to one part in 256
    assert gaps == pytest.approx({"loss": 2.5e-4, "grad_norm": 0.0})


def test_a_loss_that_is_no_number_is_a_disagreement():
    runs = {"ours": [run(1.0)], "peer_best": [run(1.0, loss=float("nan"))]}
    with pytest.raises(DisagreementError, match="nan"):
        check_agreement(runs, dtype="float32")


def test_the_table_has_a_line_for_each_side_and_each_ratio():
    runs = {"ours": [run(2.0)], "peer_best": [run(5.0)]}
    report = {
        "sides": {"ours": "posttrain", "peer_best": "TRL, packed"},
        "work": {"tokens": 100},
        "clock": "cpu_seconds",
        "summary": summarise(runs),
        "shares": {"ours": 0.42, "peer_best": 0.168},
    }
    lines = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in table(report).splitlines()
    ]
    assert lines[2] == ["posttrain", "2.00", "1.00", "1.00", "50", "42%"]
    assert lines[3][:2] == ["TRL, packed", "5.00"]
    assert lines[4][:2] == ["TRL, packed / ours", "2.50 (2.50-2.50)"]


def test_a_section_names_command_machine_and_what_is_compared():
    runs = {"ours": [run(2.0)]}
    report = {
        "benchmark": "sft",
        "what": "SFT on answers",
        "command": "python -m benchmarks.sft",
        "config": {"size": "tiny", "threads": 1, "rounds": 3, "steps": 2},
        "dtype": "float32",
        "machine": {"processor": "P", "cores": "2", "torch": "1", "transformers": "2", "trl": "3"},
        "sides": {"ours": "posttrain"},
        "work": {"tokens": 100},
        "clock": "cpu_seconds",
        "product_gflops": {"float32": 50.0, "bfloat16": 8.0},
        "summary": summarise(runs),
        "shares": {"ours": 0.42},
        "agreement": {"loss": 1e-7},
    }
    text = section(report)
    assert text.startswith("### sft, tiny, float32, 1 thread(s)\n\n`python -m benchmarks.sft`: SFT")
    for words in ("P, 2 cores", "trl 3", "float32 50.0", "3 rounds of 2 steps", "loss 1.0e-07"):
        assert words in text


def test_markdown_aligns_its_columns():
    assert markdown([("a", "bb"), ("ccc", "d")]) == "| a   | bb |\n|-----|----|\n| ccc | d  |"
