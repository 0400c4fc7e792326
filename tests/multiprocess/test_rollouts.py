"""Who samples on two ranks: gathers of weights, engines of each rank's own, one server for both."""

import importlib.util

import pytest
import rollout_jobs
from ranks import run_ranks

from tests.conftest import make_model, make_tokenizer

# TRL's client of a server needs the package requests.
ONE_FOR_BOTH = "server" if importlib.util.find_spec("requests") else "colocate"
MODES = {"ddp": ONE_FOR_BOTH, "zero3": "colocate"}


@pytest.fixture(scope="module", params=MODES)
def engine(request, tmp_path_factory):
    """(config, results of both ranks)."""
    folder = tmp_path_factory.mktemp(request.param)
    make_model().save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    arguments = {"folder": str(folder), "model": str(folder / "model")}
    return request.param, run_ranks(
        rollout_jobs.train, config=request.param, timeout_seconds=120, mode=MODES[request.param],
        **arguments,
    )  # fmt: skip


def test_the_decode_loop_gathers_the_weights_once_a_rollout_and_not_once_a_token(engine):
    config, ranks = engine
    once = ["context"] if config == "zero3" else []
    for results in ranks:
        assert results["hf"]["gathers"] == [once] * 2


def test_vllm_is_brought_the_weights_one_by_one(engine):
    """So that no rank holds all of them beside its shard."""
    config, ranks = engine
    for results in ranks:
        one_by_one = ["context"] * results["vllm"]["num_parameters"]
        assert len(one_by_one) > 10
        assert results["vllm"]["gathers"] == [one_by_one if config == "zero3" else []] * 2


def test_each_rank_trains_on_the_completions_that_the_decode_loop_would_have_sampled(engine):
    first, second = (results["vllm"]["rollouts"] for results in engine[1])
    for results in engine[1]:
        assert results["vllm"]["rollouts"] == results["hf"]["rollouts"]
        assert results["vllm"]["gap"][0] < 1e-4
    assert first != second
