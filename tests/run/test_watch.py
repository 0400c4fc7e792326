"""What a run's metrics say: each finding begins once, ends with a milder bound, and is counted."""

import dataclasses
import re

import pytest

from posttrain.run.watch import CHECKS, DONE, Watch, course
from recipes import grpo, kimi_k15, ppo, r1_zero, trpo

RECIPES = (grpo, kimi_k15, ppo, r1_zero, trpo)

HEALTHY = {
    "loss": -0.02, "grad_norm": 0.5, "clip_share": 0.0, "reward": 0.5, "accuracy": 0.4,
    "format": 0.6, "reward_std_zero": 0.3, "truncated": 0.01, "entropy": 0.5,
    "ratio_outside": 0.0, "mean_completion_tokens": 30.0,
}  # fmt: skip
PARTS = ("accuracy", "format")


def lines(count=8, **courses):
    """Healthy lines, with the given metrics' first values; their last one stays."""
    changes = ({k: v[min(i, len(v) - 1)] for k, v in courses.items()} for i in range(count))
    return [{**HEALTHY, **change} for change in changes]


def findings(run, parts=PARTS):
    """(number of the line, name) of all that begins in a run."""
    watch = Watch(parts)
    return [(i, found.name) for i, line in enumerate(run) for found in watch.read(line)]


def said(run, parts=PARTS):
    watch = Watch(parts)
    return " ".join(str(found) for line in run for found in watch.read(line))


def test_a_healthy_run_is_left_in_peace():
    assert findings(lines(accuracy=[0.2, 0.3, 0.4, 0.5], format=[0.4, 0.5, 0.7, 0.8])) == []


ILL = {
    "groups of equal rewards": {"reward_std_zero": [0.5, 0.9, 0.9]},
    "truncated answers": {"truncated": [0.1, 0.3]},
    "entropy collapse": {"entropy": [0.5, 0.4, 0.3, 0.09]},
    "KL runaway": {"kl": [0.01, 0.02, 0.02, 0.2]},
    "ratio at the first update": {"ratio_outside": [0.0, 0.06]},
    "rewards that disagree": {"format": [0.2, 0.3, 0.5, 0.6]},
    "longer answers": {"mean_completion_tokens": [30.0, 33.0, 35.0, 35.0]},
    "no gradient": {"loss": [0.0], "grad_norm": [0.0]},
    "loss": {"loss": [-0.001]},
}


@pytest.mark.parametrize("name", ILL)
def test_each_illness_is_said_once_when_it_begins_to_hold(name):
    run = lines(**ILL[name])
    (found,) = findings(run)
    assert found[1] == name
    watch = Watch(PARTS)
    for line in run:
        watch.read(line)
    assert watch.active == [name]


@pytest.mark.parametrize("name", ILL)
def test_flags_that_are_named_are_those_of_every_rl_recipe_or_said_to_be_grpos(name):
    plain, *of_grpo = re.split(r"recipes/grpo.py: |\)", said(lines(**ILL[name])))
    for recipe, text in [(grpo, " ".join(of_grpo)), *((recipe, plain) for recipe in RECIPES)]:
        flags = set(re.findall(r"--(\w+)", text))
        assert flags <= {field.name for field in dataclasses.fields(recipe.Config)}


def test_every_check_has_its_illness_here():
    assert {check.name for check in CHECKS} == set(ILL)


@pytest.mark.parametrize(
    ("name", "values", "milder", "well"),
    [
        ("reward_std_zero", 0.9, 0.7, 0.5),
        ("truncated", 0.3, 0.15, 0.05),
        ("entropy", 0.09, 0.14, 0.4),
        ("ratio_outside", 0.06, 0.03, 0.0),
        ("mean_completion_tokens", 35.0, 33.5, 30.0),
    ],
)
def test_around_its_bound_a_value_is_not_said_again_but_after_it_was_well_it_is(
    name, values, milder, well
):
    ill = [HEALTHY[name]] * 3 + [values] * 3
    wavering = lines(12, **{name: [*ill, milder, values, milder, values, values, values]})
    assert len(findings(wavering)) == 1
    cured = lines(14, **{name: [*ill, well, well, well, values, values, values]})
    assert len(findings(cured)) == 2


def test_only_warnings_are_counted_and_only_while_they_hold():
    watch, numbers = Watch(PARTS), []
    run = lines(6, truncated=[0.3, 0.3, 0.3, 0.0], mean_completion_tokens=[30.0, 60.0])
    for line in run:
        watch.read(line)
        numbers.append(watch.num_warnings)
    assert numbers == [0, 1, 1, 0, 0, 0]
    assert {name: n for name, n in watch.counts.items() if n} == {"truncated answers": 2}
    assert "longer answers" in watch.active


def test_cut_answers_of_a_base_model_that_learns_to_end_them_are_not_warned_of():
    assert findings(lines(truncated=[0.6, 0.4, 0.25, 0.1, 0.02])) == []


def test_what_looks_ill_at_the_end_of_a_task_is_its_end():
    done = {"accuracy": [0.5, 0.7, DONE, 0.99]}
    assert findings(lines(entropy=[0.5, 0.3, 0.09, 0.01], **done)) == []
    text = said(lines(reward_std_zero=[0.5, 0.7, 0.9, 0.9, 0.95], **done))
    assert "Nearly all are right" in text
    assert "easier problems" in said(lines(reward_std_zero=[0.9], accuracy=[0.0]))


def test_longer_answers_are_judged_by_whether_they_are_better():
    longer = {"mean_completion_tokens": [30.0, 33.0, 35.0, 38.0]}
    assert "R1-Zero" in said(lines(accuracy=[0.2, 0.3, 0.4, 0.5], **longer))
    assert "no better for it" in said(lines(**longer))


def test_a_kl_that_grows_slowly_or_stays_small_is_no_runaway():
    assert findings(lines(kl=[0.001, 0.002, 0.002, 0.02])) == []
    assert findings(lines(kl=[0.05, 0.07, 0.09, 0.11, 0.13])) == []
    assert findings(lines(kl_per_completion=[1.0, 2.0, 2.0, 30.0])) == [(3, "KL runaway")]


def test_a_zero_loss_is_explained_with_the_gradient_that_is_not():
    text = said(lines(loss=[-0.001]))
    assert text.startswith("note    loss: -0.001 is expected")
    assert "grad_norm 0.5" in text


def test_numbers_that_are_missing_or_not_finite_are_passed_over():
    run = [{"loss": 0.3}, {"loss": 0.3, "entropy": float("nan")}, {"loss": 0.2, "entropy": None}]
    assert findings(run, parts=()) == []
    assert course([*run, {"entropy": 0.5}], "entropy") == [0.5]
