"""Intervals by hand, and the sentence that a run gets."""

import pytest

from posttrain.report.checks import checks_of
from posttrain.report.model import Estimate
from posttrain.report.run import read_run
from posttrain.report.verdict import difference, duration, headline_of, noise, wilson
from tests.report.runs import rl_line, rl_run, sft_run, write_run


def headline(folder):
    run = read_run(folder)
    return headline_of(run, checks_of(run))


def test_wilsons_interval_is_the_published_one():
    """Of 10 with none right the bound is z^2 / (10 + z^2) = 3.8416 / 13.8416; 5 of 10 is even."""
    assert wilson(0.0, 10) == pytest.approx((0.0, 3.8416 / 13.8416))
    low, high = wilson(0.5, 10)
    assert (low, high) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert low + high == pytest.approx(1)


def test_the_interval_of_a_difference_by_hand():
    """Half widths of 3 and 4 make 5."""
    before, after = Estimate(0.0, -4.0, 4.0), Estimate(10.0, 7.0, 13.0)
    assert difference(before, after) == pytest.approx((5.0, 15.0))
    assert difference(Estimate(0.0), after) is None


def test_held_out_accuracy_is_the_headline_where_there_is_one(tmp_path):
    found = headline(rl_run(tmp_path / "run"))
    assert found.verdict == "better"
    assert found.sentence == "It worked: Accuracy rose from 20 % to 80 %."
    assert found.of == "accuracy on 512 rows, held out"
    assert (found.after.low, found.after.high) == pytest.approx(wilson(0.8, 512))
    low, high = difference(found.before, found.after)
    assert found.change == ("+60 points", f"{100 * low:+.3g} to {100 * high:+.3g}")
    assert found.task == "RL training from runs/base/model on data/problems.jsonl"
    assert found.duration == "1 min 20 s"


def test_a_run_that_goes_on_has_not_worked_yet(tmp_path):
    found = headline(rl_run(tmp_path / "run", is_finished=False))
    assert found.sentence.startswith("It works so far: ")
    assert found.state == "not finished, 40 of 100 steps"


def test_a_change_that_may_be_chance_is_called_so(tmp_path):
    folder = rl_run(tmp_path / "run", rows={"held_out": 4})
    found = headline(folder)
    assert found.verdict == "unclear"
    assert found.sentence.endswith("which may be chance.")


def test_without_evaluation_the_training_counts_and_the_page_says_so(tmp_path):
    lines = [rl_line(step, 60) for step in range(1, 61)]
    found = headline(write_run(tmp_path / "run", lines))
    assert found.of == "accuracy in training, first and last 6 log lines"
    assert found.verdict == "better"
    assert any("Nothing was measured on held-out data" in reason for reason in found.reasons)


def test_noise_is_that_around_the_course_by_hand():
    assert noise([0.0, 1.0, 0.0, 1.0]) == pytest.approx(0.5**0.5)
    assert noise([3.0]) == 0.0


def test_a_jump_in_the_first_lines_hides_no_rise_and_a_share_ends_at_one(tmp_path):
    """As DPO's pair accuracy, which is 0 before the first step and 1 soon after."""
    values = [0.0, 0.97, *[1.0] * 38]
    lines = [{"step": i, "loss": 1.0, "pair_accuracy": v} for i, v in enumerate(values, start=1)]
    found = headline(write_run(tmp_path / "run", lines, rewards={}))
    assert found.verdict == "better"
    assert found.after.high == 1.0


def test_a_loss_that_rises_is_worse(tmp_path):
    found = headline(sft_run(tmp_path / "run", losses=(1.0, 1.1, 1.0, 2.0, 2.1, 2.2)))
    assert found.verdict == "worse"
    assert found.sentence.startswith("It got worse: Loss rose from ")
    assert "rising loss" in found.reasons[0]


def test_a_single_line_is_too_little(tmp_path):
    found = headline(sft_run(tmp_path / "run", losses=(1.0,)))
    assert (found.verdict, found.before, found.change) == ("unclear", None, None)


def test_a_resumed_run_took_the_time_of_all_its_parts(tmp_path):
    times = (10.0, 20.0, 5.0, 15.0)
    lines = [{"step": i, "loss": 1.0, "seconds": s} for i, s in enumerate(times, start=1)]
    assert read_run(write_run(tmp_path / "run", lines)).seconds == 35.0


@pytest.mark.parametrize(
    ("seconds", "text"), [(41.6, "42 s"), (200, "3 min 20 s"), (7500, "2 h 5 min")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_token_accuracy_held_out_is_sfts_headline_with_an_interval(tmp_path):
    lines = [{"step": i, "loss": 1.0, "token_accuracy": 0.9} for i in range(1, 9)]
    ends = [{"step": s, "eval_loss": 1 - s / 10, "eval_token_accuracy": v}
            for s, v in ((0, 0.5), (8, 0.9))]  # fmt: skip
    environment = {"rewards": {}, "rows": {"train": 50, "held_out": 200}}
    found = headline(write_run(tmp_path / "run", [*lines, *ends], **environment))
    assert found.of == "token accuracy on 200 rows, held out"
    assert (found.before.low, found.before.high) == pytest.approx(wilson(0.5, 200))
    assert found.sentence == "It worked: Token accuracy rose from 50 % to 90 %."
