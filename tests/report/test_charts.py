"""Scales, ticks, smoothing and numbers, by hand."""

import pytest

from posttrain.report.charts import (
    BOTTOM,
    LEFT,
    RIGHT,
    TOP,
    draw,
    is_noisy,
    short,
    smoothed,
    thinned,
    ticks,
)  # fmt: skip
from posttrain.report.metrics import charts_of
from posttrain.report.model import Chart, Series
from posttrain.report.run import read_run
from tests.report.runs import rl_run, sft_run, write_run


@pytest.mark.parametrize(
    ("value", "is_share", "text"),
    [
        (0.248, True, "24.8 %"), (1.0, True, "100 %"), (0.03125, False, "0.0312"),
        (0, False, "0"), (1240, False, "1,240"), (2.5e-6, False, "2.5e-6"),
        (-3e-7, False, "-3e-7"), (1.25e9, False, "1.25e9"),
    ],
)  # fmt: skip
def test_numbers_are_short(value, is_share, text):
    assert short(value, is_share=is_share) == text


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 1, [0, 0.5, 1]), (0, 80, [0, 20, 40, 60, 80]), (-3, 3, [-2, 0, 2])],
)
def test_ticks_are_round_and_inside(low, high, expected):
    assert ticks(low, high) == pytest.approx(expected)


def test_ticks_of_steps_are_whole():
    assert ticks(1, 3, whole=True) == [1, 2, 3]


def test_the_moving_mean_is_that_of_both_sides():
    """Of few values a neighbour counts a half, and one further away a quarter."""
    assert smoothed([1.0, 6.0]) == pytest.approx([(1 + 3) / 1.5, (0.5 + 6) / 1.5])
    assert smoothed([4.0, 2.0, 1.0])[1] == pytest.approx((2 + 2 + 0.5) / 2)
    assert smoothed([2.0] * 40) == pytest.approx([2.0] * 40)
    assert smoothed([]) == []


def test_the_moving_mean_does_not_lag():
    """In the middle of a straight rise the mean of both sides is the value itself."""
    rise = [float(step) for step in range(201)]
    assert smoothed(rise)[100] == pytest.approx(100)


def test_a_course_without_noise_is_not_smoothed():
    """A moving mean would bend the ends of a schedule."""
    schedule = [1e-4 * (1 - step / 50) for step in range(50)]
    noise = [value + 1e-5 * (step % 2) for step, value in enumerate(schedule)]
    assert [is_noisy(values) for values in (schedule, [1.0] * 50, noise)] == [False, False, True]
    series = [Series("a", "a", list(range(1, 51)), values) for values in (schedule, noise)]
    curves = draw(Chart("a", "a", "", series, ""), last_step=50).curves
    assert [bool(curve.smooth) for curve in curves] == [False, True]


def test_a_line_runs_from_corner_to_corner():
    """Values 0 and 1 of a share, at the first and the last step."""
    series = Series("a", "a", [1, 100], [0.0, 1.0])
    drawing = draw(Chart("a", "a", "", [series], "", is_share=True), last_step=100)
    assert drawing.curves[0].points == [(LEFT, BOTTOM), (RIGHT, TOP)]
    assert [text for _, text in drawing.y_ticks] == ["0 %", "50 %", "100 %"]


def test_equal_values_and_a_single_one_can_be_drawn():
    for values in ([0.0], [5.0, 5.0], [-1e-9, -1e-9]):
        series = Series("a", "a", list(range(1, len(values) + 1)), values)
        drawing = draw(Chart("a", "a", "", [series], ""), last_step=len(values))
        assert all(TOP <= y <= BOTTOM for _, y in drawing.curves[0].points)


def test_thinning_takes_means_of_neighbours_and_keeps_the_last_step():
    series = thinned(Series("a", "a", list(range(1, 2002)), [1.0, 2.0, 3.0] * 667))
    assert len(series.values) == 667
    assert series.values == [2.0] * 667
    assert series.steps[-1] == 2001


def test_every_metric_of_a_run_is_in_exactly_one_chart(tmp_path):
    """But for the main reward, which has its own chart and is a part of the reward."""
    run = read_run(rl_run(tmp_path / "run"))
    names = [s.name for chart in charts_of(run) for s in chart.series]
    logged = {n for line in run.lines for n in line} - {"step", "epoch", "seconds", "warnings"}
    assert logged <= set(names)
    assert sorted(n for n in names if names.count(n) > 1) == ["accuracy", "accuracy"]
    keys = [chart.key for chart in charts_of(run)]
    assert len(keys) == len(set(keys))


def test_what_is_known_is_explained_and_nothing_is_invented(tmp_path):
    charts = charts_of(read_run(sft_run(tmp_path / "run")))
    assert [chart.title for chart in charts] == ["Loss", "Gradient norm", "Learning rate"]
    assert all(chart.meaning.endswith(".") for chart in charts)


def test_the_curves_that_a_report_promises_have_a_chart_and_a_meaning(tmp_path):
    pairs = {"margin": 0.1, "pair_accuracy": 0.6, "chosen_log_ratio": 0.1, "rejected_log_ratio": 0}
    lines = [{"step": step, "loss": 0.6, **pairs} for step in range(1, 5)]
    dpo = write_run(tmp_path / "dpo", lines, trainer="PreferenceTrainer", rewards={})
    found = {chart.key: chart for chart in charts_of(read_run(rl_run(tmp_path / "rl")))}
    of_pairs = {chart.key: chart for chart in charts_of(read_run(dpo))}
    assert {
        *("loss", "reward", "main_reward", "length", "kl", "entropy", "grad_norm", "clip_share"),
        *("reward_std_zero", "truncated", "learning_rate"),
        *("tokens_per_second", "peak_memory_gb", "time_split"),
    } <= set(found)
    assert {"loss", "log_ratio", "margin", "pair_accuracy"} <= set(of_pairs)
    assert all(chart.meaning for chart in (*found.values(), *of_pairs.values()))
    assert [s.label for s in found["length"].series] == ["mean", "10 %", "median", "90 %"]
    assert [s.label for s in found["main_reward"].series] == ["accuracy", "accuracy, held out"]
    assert found["reward"].series[0].label == "total"
