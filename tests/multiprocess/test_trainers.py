"""Our trainers on two ranks: each engine trains as one process does, and is really that engine."""

import re

import pytest
import torch
import trainer_jobs
from ranks import run_ranks

from tests.trainers.tiny import KINDS

ENGINES = {"ddp": ("DistributedDataParallel", None),
           "zero3": ("DeepSpeedEngine", 3)}  # fmt: skip


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """(results by kind, folder) of the run that every engine must reproduce."""
    folder = tmp_path_factory.mktemp("one")
    (results,) = run_ranks(trainer_jobs.train, world_size=1, folder=str(folder))
    assert {result["engine"] for result in results.values()} == {"LlamaForCausalLM"}
    return results, folder


@pytest.fixture(scope="module", params=ENGINES)
def engine(request, tmp_path_factory):
    """(config, results of both ranks, folder)."""
    folder = tmp_path_factory.mktemp(request.param)
    return request.param, run_ranks(
        trainer_jobs.train, config=request.param, folder=str(folder)
    ), folder  # fmt: skip


def saved_weights(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder / "model").state_dict()


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_engine_asked_for_on_two_ranks(kind, engine):
    config, ranks, _ = engine
    for rank, results in enumerate(ranks):
        result = results[kind]
        assert (result["engine"], result["stage"]) == ENGINES[config]
        assert result["rank"] == (rank, rank, 2)
        # Between steps ZeRO-3 holds half of the 48 x 32 weight, and nothing of it whole.
        assert result["held"] == ((0, 768) if config == "zero3" else None)


@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_train_as_one_process_does(kind, engine, one_process):
    """Losses to 2e-6, gradient norms to 1e-4 relative, saved weights to 3e-6."""
    _, ranks, folder = engine
    expected = one_process[0][kind]
    for results in ranks:
        assert results[kind]["losses"] == pytest.approx(expected["losses"], abs=2e-6, rel=0)
        assert results[kind]["grad_norms"] == pytest.approx(expected["grad_norms"], rel=1e-4)
        assert results[kind]["kl"] == pytest.approx(expected["kl"], rel=1e-3, abs=1e-6)
    saved, reference = saved_weights(folder / kind), saved_weights(one_process[1] / kind)
    assert saved.keys() == reference.keys()
    for name, weight in saved.items():
        torch.testing.assert_close(weight, reference[name], atol=3e-6, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_replicas_stay_equal_although_they_were_evaluated_before_training(kind, engine):
    config, (first, second), _ = engine
    if config == "zero3":
        assert first[kind]["weights"] is second[kind]["weights"] is None  # there are no replicas
    else:
        assert torch.equal(first[kind]["weights"], second[kind]["weights"])


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_counts_every_example_once_over_all_ranks(kind, engine, one_process):
    """5 examples, 2 at a time on 2 ranks: the last batch of rank 1 is empty."""
    for results in engine[1]:
        for found, expected in zip(
            results[kind]["evaluations"], one_process[0][kind]["evaluations"], strict=True
        ):
            assert found == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_ranks_ran_different_numbers_of_microbatches(engine):
    """DDP lets them; DeepSpeed communicates in every pass, so there the emptier rank keeps step."""
    config, (first, second), _ = engine
    counts = first["sft"]["parts"], second["sft"]["parts"]
    assert max(counts[0]) > 1
    assert (counts[0] == counts[1]) is (config != "ddp")


def test_each_rank_samples_completions_of_its_own_which_together_are_one_process(
    engine, one_process
):
    _, (first, second), _ = engine
    (mine, other), expected = (
        [[group for rollout in results["rl"]["rollouts"] for group in rollout]
         for results in (first, second)],
        [group for rollout in one_process[0]["rl"]["rollouts"] for group in rollout],
    )  # fmt: skip
    assert len(mine) == len(other) == len(expected) // 2
    assert not [group for group in mine if group in other]
    assert sorted(mine + other) == sorted(expected)


def test_an_epochs_last_batch_repeats_no_example_on_any_rank(tmp_path):
    """accelerate would fill it up; with 3 documents left of 8, the second rank has none."""
    job = trainer_jobs.train_by_epochs
    (expected,) = run_ranks(job, world_size=1, folder=str(tmp_path / "one"))
    for runs in run_ranks(job, config="ddp", folder=str(tmp_path / "two")):
        for run, whole in zip(runs, expected, strict=True):
            assert len(run["losses"]) == 6
            assert run["losses"] == pytest.approx(whole["losses"], abs=2e-6, rel=0)
            torch.testing.assert_close(run["weights"], whole["weights"], atol=1e-6, rtol=0)


@pytest.mark.parametrize("config", ["ddp", "zero2"])
def test_a_nan_on_one_rank_stops_all_ranks_before_the_weights_change(config, tmp_path):
    for rank, ends in enumerate(
        run_ranks(trainer_jobs.nan_on_rank_one, config=config, folder=str(tmp_path))
    ):
        assert len(ends) == len(KINDS)
        for end in ends:
            assert "not finite at step 2" in end["said"]
            assert f"on rank {rank})" in end["said"]
            assert end["unchanged"]
            assert end["moved"]


@pytest.mark.parametrize("config", ["ddp", "zero3"])
def test_ranks_that_are_asked_to_stop_at_different_steps_stop_at_the_same(config, tmp_path):
    """One step after the first of them knows; RL where its rollout of two steps is used up."""
    for ends in run_ranks(trainer_jobs.signalled_apart, config=config, folder=str(tmp_path)):
        assert ends == [("sft", 2, 15), ("dpo", 2, 15), ("rl", 2, 15)]


def test_a_rank_that_stands_still_is_named(tmp_path):
    said, _ = run_ranks(trainer_jobs.a_stopped_rank, config="ddp", folder=str(tmp_path))
    assert re.match(
        r"rank 1 has not been heard of for \d+ seconds while the ranks waited for each other in "
        r"step 2 ", said,
    )  # fmt: skip


def test_a_run_resumed_within_an_epoch_counts_its_last_examples_once(tmp_path):
    """Of the last step of 8 only 5 are real; the others fill the ranks' batches."""
    for whole, resumed in run_ranks(
        trainer_jobs.resumed_within_an_epoch, config="ddp", folder=str(tmp_path)
    ):
        assert torch.equal(whole, resumed)


def test_grpo_with_guesses_on_two_ranks_gives_the_weights_of_plain_decoding(tmp_path):
    for plain, guessed in run_ranks(trainer_jobs.rl_with_guesses, folder=str(tmp_path)):
        assert (plain["weights"] - guessed["weights"]).abs().max() <= 1e-6
        assert not plain["gained"]
        assert max(guessed["gained"]) > 1


@pytest.mark.parametrize("config", ["ddp", "zero3", "fsdp2"])
def test_held_out_pairs_have_the_log_ratios_of_one_process(config, tmp_path):
    """A divided model's forwards need all ranks; it completes nothing, and a line says so."""
    job = trainer_jobs.held_out_samples
    ((expected, said),) = run_ranks(job, world_size=1, folder=str(tmp_path / "one"))
    assert "left out" not in said
    (found, said), _ = run_ranks(job, config=config, folder=str(tmp_path / "two"))
    if config != "ddp":
        expected = [sample for sample in expected if sample["chosen"] != "held out"]
        assert "the model's own completions of held-out rows are left out" in said
    keys = ("step", "chosen", "prompt", "completion")
    assert [[s[key] for key in keys] for s in found] == [[s[key] for key in keys] for s in expected]
    ratios = [[s["log_ratio"] for s in run if "log_ratio" in s] for run in (found, expected)]
    assert len(ratios[0]) == 4 * 4 * 2  # evaluations, pairs, sides
    assert ratios[0] == pytest.approx(ratios[1], abs=2e-4)
    assert any(ratio > 0.01 for ratio in ratios[0])
