"""The samples that a report shows, and the reward-hacking panel that reads them."""

from itertools import pairwise

import pytest

from posttrain.report.hacking import disagreeing, form_series, hacking_of
from posttrain.report.run import read_run
from posttrain.report.samples import choose, pack_samples, shortened, text_of
from tests.report.runs import rl_line, rl_run, sample, write_run


def test_a_sample_keeps_its_text_its_rules_and_its_log_probs(tmp_path):
    run = read_run(rl_run(tmp_path / "run", samples=[sample(3, 1, text="a b c")]))
    packed = pack_samples(run)
    assert packed["samples"] == [
        {
            "s": 3, "p": 0, "r": 1.2, "v": [1.0, 1.0], "n": 4, "e": "stop",
            "w": ["equal numbers", None], "c": "first",
            "t": ["a", " b", " c", "<|end|>"], "l": [0, -30, -60, -1],
        }
    ]  # fmt: skip
    assert packed["prompts"] == ["1 + 1?"]
    assert packed["left_out"] == packed["bare"] == 0


def test_a_long_completion_has_a_gap_and_its_whole_text(tmp_path):
    record = sample(1, 1, token_logps=[["a", -1.0, 1], None, ["z", -0.5, 1]], completion="a…z")
    (packed,) = pack_samples(read_run(rl_run(tmp_path / "run", samples=[record])))["samples"]
    assert (packed["t"], packed["l"], packed["x"]) == (["a", None, "z"], [-100, None, -50], "a…z")


def test_samples_of_before_log_probs_were_kept_can_be_shown(tmp_path):
    old = {"step": 1, "prompt": "p", "completion": "c", "reward": None, "accuracy": None,
           "format": 0.0, "tokens": 2, "finish_reason": "length"}  # fmt: skip
    folder = write_run(tmp_path / "run", [rl_line(1, 1)], samples=[old])
    environment = folder / "env.json"
    environment.write_text(environment.read_text().replace('"rewards"', '"other"'))
    run = read_run(folder)
    assert run.parts == ("accuracy", "format")
    (packed,) = pack_samples(run)["samples"]
    assert (packed["x"], packed["r"], packed["v"]) == ("c", None, [None, 0.0])


def test_a_scored_pair_keeps_its_margin_and_what_both_were_before(tmp_path):
    record = sample(4, 0, chosen="rejected", reward=0.5, margin=-0.25, pair="worst",
                    before={"reward": 0.1, "margin": None})  # fmt: skip
    (packed,) = pack_samples(read_run(rl_run(tmp_path / "run", samples=[record])))["samples"]
    assert (packed["r"], packed["m"], packed["k"]) == (0.5, -0.25, "worst")
    assert packed["b"] == [0.1, None]


def test_of_many_samples_the_first_and_last_steps_are_kept_with_those_between():
    records = [sample(step, n) for step in range(1, 1001) for n in range(4)]
    kept = choose(records, 200)
    steps = sorted({record["step"] for record in kept})
    assert len(kept) == 200
    assert (steps[0], steps[-1], len(steps)) == (1, 1000, 50)
    assert all(15 <= b - a <= 25 for a, b in pairwise(steps))


def test_held_out_samples_have_up_to_half_of_the_places():
    held_out = [sample(step, 0, chosen="held out") for step in range(300)]
    records = [*held_out, *(sample(step, 1) for step in range(300))]
    kept = choose(records, 200)
    assert len(kept) == 200
    assert sum(record["chosen"] == "held out" for record in kept) == 100


def test_messages_and_long_texts_are_written_as_text():
    assert text_of([{"role": "user", "content": "hi"}]) == "user: hi"
    assert shortened("x" * 100, 10) == "xxxxx […90 characters…] xxxxx"


def test_the_furthest_apart_parts_come_first_each_on_its_own_range():
    """Format runs from 0 to 10: 1 right with 10 agrees, 1 right with 0 does not."""
    rows = [{"v": [1.0, 10.0]}, {"v": [1.0, 0.0]}, {"v": [0.0, 5.0]}, {"v": [None, 5.0]}]
    assert disagreeing(rows) == [1, 2]
    assert disagreeing([{"v": [1.0]}]) == disagreeing([]) == []


def test_a_part_that_never_changes_is_read_from_0_and_equals_are_shown_from_the_newest():
    """Format is always 1: a wrong sample disagrees and a right one does not."""
    rows = [{"v": [0.0, 1.0]}, {"v": [1.0, 1.0]}, {"v": [0.0, 1.0]}]
    assert disagreeing(rows) == [2, 0]
    assert disagreeing([{"v": [1.0, 0.0]}, {"v": [0.5, 0.0]}]) == []


def test_the_share_of_the_other_parts_by_hand(tmp_path):
    """0.2 * 0.5 of 0.3 + 0.2 * 0.5 is a quarter."""
    line = {**rl_line(1, 1), "accuracy": 0.3, "format": 0.5}
    run = read_run(write_run(tmp_path / "run", [line]))
    assert form_series(run).values == [pytest.approx(0.25)]


def hacked(folder, **courses):
    lines = [{**rl_line(step, 40), **{n: f(step) for n, f in courses.items()}}
             for step in range(1, 41)]  # fmt: skip
    lines += [{"step": step, "eval_accuracy": 0.3} for step in (0, 40)]
    return hacking_of(read_run(write_run(folder, lines)), [])


def test_a_reward_that_rises_alone_is_a_sign(tmp_path):
    signs = " ".join(hacked(tmp_path / "run").signs)
    assert "held-out accuracy did not (+0.00): it is gained by other means" in signs
    assert "accuracy rose in training and not held out" in signs


def test_form_length_and_loops_are_signs(tmp_path):
    found = hacked(
        tmp_path / "run", accuracy=lambda _: 0.05, mean_completion_tokens=lambda s: 10.0 * s,
        repetition=lambda s: s / 50,
    )  # fmt: skip
    signs = " ".join(found.signs)
    assert "of the reward comes from other parts than accuracy" in signs
    assert "Completions grew from" in signs
    assert "repeat themselves more" in signs


def test_a_run_whose_held_out_result_rises_has_no_sign(tmp_path):
    run = read_run(rl_run(tmp_path / "run"))
    found = hacking_of(run, pack_samples(run)["samples"])
    assert found.signs == []
    assert [chart.key for chart in found.charts] == ["hacking_reward", "hacking_form"]
    assert "accuracy, held out" in [drift.label for drift in found.drifts]
