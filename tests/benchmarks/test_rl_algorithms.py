"""The benchmark of algorithms: settings that the recipes have, what is run, table and curves."""

import importlib
import json
from xml.etree import ElementTree

import pytest

from benchmarks import rl_algorithms
from benchmarks.rl_algorithms import RUNS, Config, is_there, main, table
from benchmarks.rl_curves import curves, mean_curve
from posttrain.errors import ConfigError
from posttrain.run.options import validate


def a_run(accuracy, curve=(), steps=10):
    return {"accuracy": accuracy, "curve": list(curve), "steps": steps, "cpu_seconds": 30}


@pytest.mark.parametrize("name", filter(is_there, RUNS))
def test_the_settings_of_each_algorithm_are_ones_that_its_recipe_has(name):
    recipe, settings = RUNS[name]
    validate(importlib.import_module(f"recipes.{recipe}").Config(**settings))


def test_the_table_has_means_and_points_best_first():
    """(0.5 + 0.7)/2 = 60 %, 35 points above 25 %."""
    text = table(0.25, {"a": [a_run(0.3)], "b": [a_run(0.5), a_run(0.7)]})
    rows = text.splitlines()[2:]
    assert rows[0] == "| `b` | 60.0 | +35.0 | 50.0, 70.0 | 10 | 30 |"
    assert rows[1].startswith("| `a` | 30.0 | +5.0 |")


def test_a_curve_is_the_mean_where_all_seeds_have_a_point():
    runs = [a_run(0.5, [[2, 0.1], [4, 0.3]]), a_run(0.5, [[2, 0.3], [6, 0.9]])]
    assert mean_curve(runs) == [(2, pytest.approx(0.2))]


def test_the_picture_has_a_panel_for_each_and_places_points_by_share():
    """Half of 10 steps lies in the middle; 100 % at the top, 0 % at the bottom."""
    found = {"a": [a_run(1.0, [[0, 0.0], [5, 0.5], [10, 1.0]])], "b": [a_run(0.4)]}
    tree = ElementTree.fromstring(curves(0.0, found))
    lines = [e.attrib["points"] for e in tree.iter() if e.tag.endswith("polyline")]
    assert lines[0] == "0,70.0 65,35.0 130,0.0"
    assert lines[1] == "0,70.0 130,42.0"  # no curve: from the start to the end
    texts = [e.text for e in tree.iter() if e.tag.endswith("text")]
    assert texts == ["a 100 %", "b 40 %"]


def test_what_is_done_is_not_run_again(tmp_path, monkeypatch, capsys):
    started = []

    monkeypatch.setattr(rl_algorithms, "make_missing", lambda _: None)
    monkeypatch.setattr(rl_algorithms, "start", lambda _, *job: started.append(job) or 1)
    (tmp_path / "start.json").write_text("0.25")
    (tmp_path / "grpo-0.json").write_text(json.dumps(a_run(0.5)))
    main(Config(algorithms=["grpo", "trpo"], seeds=2, output_dir=str(tmp_path)))
    assert sorted(started) == [("grpo", 1), ("trpo", 0), ("trpo", 1)]
    assert "grpo, seed 1: failed, see its log" in capsys.readouterr().out
    assert "| `grpo` | 50.0 | +25.0 |" in (tmp_path / "table.md").read_text()
    assert json.loads((tmp_path / "results.json").read_text())["before"] == 0.25


def test_an_algorithm_that_is_not_there_is_refused():
    with pytest.raises(ConfigError, match="found gppo"):
        validate(Config(algorithms=["gppo"]))
