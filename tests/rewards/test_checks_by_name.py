"""Rewards by name: from our table, or from a file of the user's."""

import sys
from functools import partial
from pathlib import Path

import pytest

from posttrain.errors import ConfigError
from posttrain.rewards.checks import load_reward
from posttrain.rewards.math import math_reward
from posttrain.rewards.pieces import portable
from tests.rewards.test_pieces import score_in_workers

MY_REWARDS = """
from beside import BONUS

def short(completions, *, level, prefilled_think=False, **_columns):
    return [BONUS / len(c) + n + prefilled_think for c, n in zip(completions, level, strict=True)]
"""


@pytest.fixture
def my_rewards(tmp_path):
    (tmp_path / "beside.py").write_text("BONUS = 8\n")
    path = tmp_path / "math.py"  # the name of a module that is loaded already
    path.write_text(MY_REWARDS)
    return path


def test_a_function_in_a_users_file_is_a_reward_in_workers_too(my_rewards):
    reward = partial(load_reward(f"{my_rewards}:short", {}), prefilled_think=True)
    scores = score_in_workers({"short": (reward, 1.0)}, ["xxxx"], level=[10])
    assert scores.totals == [13.0]
    assert portable(reward) is not None
    assert Path(sys.modules["math"].__spec__.origin or "built-in") != my_rewards


def test_a_name_is_looked_up_in_the_table():
    assert load_reward("math", {"math": math_reward}) is math_reward


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("maths", "expected math or FILE.py:FUNCTION, found 'maths'. Did you mean 'math'"),
        ("nowhere.py:short", "found none at .*nowhere.py"),
        ("{file}:shot", "expected a function 'shot' in .*; it has short"),
        ("{broken}:f", r"cannot be imported \(SyntaxError"),
    ],
)
def test_a_reward_that_is_not_there_is_an_error_that_says_what_is(name, message, my_rewards):
    broken = my_rewards.with_name("broken.py")
    broken.write_text("def f(:\n")
    with pytest.raises(ConfigError, match=message):
        load_reward(name.format(file=my_rewards, broken=broken), {"math": math_reward})
