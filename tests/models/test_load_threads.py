"""The number of CPU threads: the faster of one and all, and only where nobody has said."""

import pytest
import torch

from posttrain.models import load as threads
from posttrain.models.load import choose_threads
from posttrain.packed.prepare import prepare
from tests.conftest import make_model


@pytest.fixture(autouse=True)
def two_threads(monkeypatch):
    """As on a machine with two cores where OMP_NUM_THREADS is not set."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def steps_take(monkeypatch):
    """Sets how long a probing step takes with one thread and with two, round by round."""

    def steps_take(one: list[float], two: list[float]) -> None:
        seconds = {1: iter(one), 2: iter(two)}

        def step_seconds(_model) -> float:
            return next(seconds[torch.get_num_threads()])

        monkeypatch.setattr(threads, "_step_seconds", step_seconds)

    return steps_take


@pytest.mark.parametrize(("one", "two", "best"), [(0.1, 0.2, 1), (0.2, 0.1, 2)])
def test_the_faster_count_is_set(steps_take, one, two, best):
    steps_take([one] * threads.ROUNDS, [two] * threads.ROUNDS)
    assert choose_threads(make_model()) == best
    assert torch.get_num_threads() == best


def test_one_slow_round_decides_nothing(steps_take):
    """The best of each counts: another process may have held the core during one probe."""
    slow = [9.0] * (threads.ROUNDS - 1)
    steps_take([0.2] * threads.ROUNDS, [*slow, 0.1])
    assert choose_threads(make_model()) == 2


def test_what_the_user_has_said_stays(steps_take, monkeypatch):
    steps_take([], [])  # a probe would fail
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert choose_threads(make_model()) == 2
    assert torch.get_num_threads() == 2


def test_a_single_core_is_not_probed(steps_take):
    steps_take([], [])
    torch.set_num_threads(1)
    assert choose_threads(make_model()) == 1


def test_a_large_model_is_not_probed(steps_take, monkeypatch):
    steps_take([], [])
    monkeypatch.setattr(threads, "SMALL", 10)
    assert choose_threads(make_model()) == 2


@pytest.mark.parametrize("vocabulary", [97, 20])
def test_the_probe_leaves_weights_gradients_and_random_numbers_alone(vocabulary, monkeypatch):
    monkeypatch.setattr(threads, "ROUNDS", 1)
    monkeypatch.setattr(threads, "PROBE_DOCUMENTS", 2)
    model = make_model(vocab_size=vocabulary).train()
    prepare(model)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    state = torch.get_rng_state()
    choose_threads(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model.training
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, before[name])
