"""Two ranks on one machine: the harness itself, and the engines under transformers' own Trainer."""

import jobs
import pytest
import torch
from ranks import RankFailure, run_ranks

from posttrain.run.engine import World, asked_world

ENGINES = {"ddp": ("DistributedDataParallel", None), "zero1": ("DeepSpeedEngine", 1),
           "zero2": ("DeepSpeedEngine", 2), "zero3": ("DeepSpeedEngine", 3)}  # fmt: skip


@pytest.fixture(scope="module")
def one_process(tmp_path_factory) -> tuple[dict, dict]:
    """Result and saved weights of the run that every engine must reproduce."""
    folder = tmp_path_factory.mktemp("one")
    (result,) = run_ranks(jobs.train, world_size=1, folder=str(folder), passes=(1,))
    assert result["engine"] == "LlamaForCausalLM"
    return result, saved_weights(folder)


def saved_weights(folder) -> dict[str, torch.Tensor]:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def test_each_rank_knows_its_place_and_the_config():
    first, second = run_ranks(jobs.place, config="zero3")
    assert (first["rank"], first["RANK"], first["LOCAL_RANK"]) == (0, "0", "0")
    assert (second["rank"], second["RANK"], second["LOCAL_RANK"]) == (1, "1", "1")
    assert {r["WORLD_SIZE"] for r in (first, second)} == {"2"}
    assert {r["ACCELERATE_DEEPSPEED_ZERO_STAGE"] for r in (first, second)} == {"3"}


def test_a_failing_rank_is_reported_before_the_others_are_waited_for(monkeypatch):
    monkeypatch.setattr("ranks.GRACE_SECONDS", 0.1)
    with pytest.raises(RankFailure, match=r"(?s)rank 1 raised.*the reward column is missing"):
        run_ranks(jobs.fail_on_rank_one, timeout_seconds=30)


def test_hanging_ranks_are_killed_and_show_where_they_hung(monkeypatch):
    monkeypatch.setattr("ranks.STACK_LEAD_SECONDS", 1.0)
    with pytest.raises(RankFailure, match=r"(?s)rank 0 hung.*in hang.*rank 1 hung.*in hang"):
        run_ranks(jobs.hang, timeout_seconds=2)


@pytest.fixture(scope="module", params=ENGINES)
def two_ranks(request, tmp_path_factory) -> tuple[str, list[dict], dict]:
    """Config, results and saved weights of two ranks, in several passes a step."""
    folder = tmp_path_factory.mktemp(request.param)
    # DeepSpeed communicates in every pass; DDP leaves their number to the rank.
    passes = (1, 3) if request.param == "ddp" else (2, 2)
    results = run_ranks(jobs.train, config=request.param, folder=str(folder), passes=passes)
    return request.param, results, saved_weights(folder)


def test_the_engine_is_the_one_asked_for_on_two_ranks(two_ranks):
    config, results, _ = two_ranks
    for rank, result in enumerate(results):
        assert (result["engine"], result["stage"]) == ENGINES[config]
        assert (result["rank"], result["processes"], result["backend"]) == (rank, 2, "gloo")
        # Between steps ZeRO-3 holds half of the 64 x 32 weight, and nothing of it whole.
        assert result["held"] == ((0, 1024) if config == "zero3" else None)


def test_two_ranks_train_as_one_process_does(two_ranks, one_process):
    """Same losses to 2e-6, same saved weights to 1e-6."""
    _, results, weights = two_ranks
    for result in results:
        assert result["losses"] == pytest.approx(one_process[0]["losses"], abs=2e-6, rel=0)
    assert weights.keys() == one_process[1].keys()
    for name, weight in weights.items():
        torch.testing.assert_close(weight, one_process[1][name], atol=1e-6, rtol=0)


def test_ranks_generate_apart_from_each_other_what_one_process_would(two_ranks, one_process):
    """Greedy answers to rank 0's prompts before every step; rank 1 has other, longer ones."""
    first, second = (result["samples"] for result in two_ranks[1])
    assert first == one_process[0]["samples"]
    assert len(second[0]) == len(first[0]) + 2
    assert second[0][:2] != first[0][:2]


def test_two_ranks_that_both_believe_to_be_rank_zero_are_refused(tmp_path):
    for config in ("ddp", "zero2"):
        for message in run_ranks(jobs.build_without_use_cpu, config=config, folder=str(tmp_path)):
            assert "of 2, engine" in message
            assert "accelerate set up rank 0 of 1" in message


def test_evaluating_before_training_makes_replicas_diverge_and_is_refused(tmp_path):
    first, second = run_ranks(jobs.evaluate_then_train, folder=str(tmp_path))
    assert (
        first["weight"] - second["weight"]
    ).abs().max() > 1e-4  # transformers' trap, still there
    assert "the model is a bare LlamaForCausalLM" in first["refusal"]
    assert "the model is a bare LlamaForCausalLM" in second["refusal"]


def test_the_configs_ask_for_what_their_names_say():
    from ranks import launch_environment

    for config, engine in {"ddp": "DDP", "zero1": "ZeRO-1", "zero2": "ZeRO-2", "zero3": "ZeRO-3",
                           "fsdp2": "FSDP"}.items():  # fmt: skip
        environment = {**launch_environment(config, 4), "WORLD_SIZE": "4", "RANK": "3"}
        assert asked_world(environment) == World(4, 3, engine)
        if config == "fsdp2":
            assert environment["FSDP_VERSION"] == "2"
            assert environment["FSDP_STATE_DICT_TYPE"] == "FULL_STATE_DICT"


def test_ranks_that_were_started_anew_do_not_look_for_those_before_them():
    for found in run_ranks(jobs.restarted):
        assert found == [[("0", 0), ("0", 1)], [("1", 0), ("1", 1)]]
