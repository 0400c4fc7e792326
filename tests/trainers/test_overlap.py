"""Rollouts sampled ahead: by which weights, corrected how, whatever the timing, over a resume."""

import shutil
import threading
import time
import traceback
from types import SimpleNamespace

import pytest
import torch
from transformers import TrainerCallback

from posttrain.errors import ConfigError, DataError
from posttrain.losses import tis_weights
from posttrain.packed.batch import pack_groups
from posttrain.packed.forward import packed_logps
from posttrain.rewards.call import Scoring
from posttrain.rollouts.options import Selection
from posttrain.rollouts.policies import PREFETCH_FILE, FrozenPolicy
from posttrain.rollouts.sampling import Sampling
from posttrain.run.checkpoints import CheckpointCallback
from posttrain.run.folder import read_log
from tests.conftest import EOS, make_model
from tests.trainers.tiny import (
    MAX_COMPLETION,
    even_share,
    logged,
    make_trainer,
    prompts,
    remember_rollouts,
    weights,
)

SAMPLING = Sampling(MAX_COMPLETION, (EOS, 2, 3), 0.9)


def overlapped(folder, *, trainer=None, **settings):
    own = {"correction": tis_weights, "overlap": True, "scoring": Scoring(num_workers=0)}
    own |= trainer or {}
    return make_trainer("rl", folder, trainer=own, **settings)


class Snapshots(TrainerCallback):
    """Step -> a model with the weights after it."""

    def __init__(self):
        self.models = {0: make_model()}

    def on_step_end(self, _args, state, _control, model, **_):
        copied = make_model()
        copied.load_state_dict(model.state_dict())
        self.models[state.global_step] = copied


def logps_under(model, rollout):
    from posttrain.packed.prepare import prepare

    prepare(model)
    ids = [[completion.token_ids for completion in siblings] for siblings in rollout.completions]
    batch = pack_groups([p["prompt_ids"] for p in rollout.prompts], ids, device="cpu")
    with torch.no_grad():
        return packed_logps(model, batch, temperature=SAMPLING.temperature).logps


@pytest.mark.parametrize("updates", [1, 2])
def test_a_rollout_is_sampled_by_the_policy_before_and_weighed_against_it(updates, tmp_path):
    """Rollouts 0 and 1 by the weights of step 0, rollout n by those that rollout n - 1 met; sampled
    log-probs are that policy's, old ones those of the policy that learns."""
    seen, snapshots = [], Snapshots()

    def weigh(old, sampler, mask):
        seen.append((old[mask.bool()], sampler[mask.bool()]))
        return tis_weights(old, sampler, mask)

    trainer = overlapped(
        tmp_path, max_steps=4 * updates, learning_rate=2e-2, trainer={
            "sampling": SAMPLING, "correction": weigh, "updates_per_rollout": updates,
            "prompts": prompts(16), "callbacks": [snapshots],
        },
    )  # fmt: skip
    rollouts = remember_rollouts(trainer)
    trainer.train()
    versions = [rollout.policy_version for rollout in rollouts]
    assert versions == [0, 0, updates, 2 * updates]
    assert logged(trainer, "staleness") == [0.0, 1.0, 1.0, 1.0]
    assert not logged(trainer, "ratio_outside")  # a warning hangs on it, and nothing is wrong
    for number, rollout in enumerate(rollouts):
        sampled = torch.tensor([x for completion in rollout.flat for x in completion.logps])
        behaviour = logps_under(snapshots.models[rollout.policy_version], rollout)
        learner = logps_under(snapshots.models[number * updates], rollout)
        assert (sampled - behaviour).abs().max() < 1e-4
        assert ((sampled - learner).abs().max() > 1e-2) == (number > 0)
        of_rollout = seen[number * updates : (number + 1) * updates]
        old, sampler = (torch.cat(x) for x in zip(*of_rollout, strict=True))
        assert torch.allclose(sampler, sampled)
        assert torch.allclose(old, learner, atol=1e-4)
    assert logged(trainer, "correction")[0] == pytest.approx(1, abs=1e-4)
    assert logged(trainer, "log_rho_p99")[updates] > 0.05 > logged(trainer, "log_rho_p99")[0]


def test_who_is_faster_changes_nothing(tmp_path):
    ends = []
    for slow in ("nobody", "sampling", "training"):
        trainer = overlapped(tmp_path / slow, max_steps=3)
        if slow == "sampling":
            delayed(trainer.rollouts, "roll_out")
        if slow == "training":
            delayed(trainer, "training_step")
        trainer.train()
        ends.append(weights(trainer.model))
    assert torch.equal(ends[0], ends[1])
    assert torch.equal(ends[0], ends[2])


def delayed(owner, name):
    original = getattr(owner, name)
    setattr(owner, name, lambda *a, **k: (time.sleep(0.3), original(*a, **k))[1])


def test_it_is_sampled_while_the_trainer_trains_and_none_in_vain(tmp_path):
    """Each step but the last waits until the next rollout is sampled; in turn, it would hang."""
    trainer, threads, begun = overlapped(tmp_path, max_steps=3), [], threading.Semaphore(0)
    original, step = trainer.rollouts.roll_out, trainer.training_step

    def roll_out(*arguments, **settings):
        threads.append(threading.current_thread().name)
        begun.release()
        return original(*arguments, **settings)

    def training_step(*arguments):
        needed = min(trainer.state.global_step + 2, 3)
        while len(threads) < needed:
            assert begun.acquire(timeout=20)
        return step(*arguments)

    trainer.rollouts.roll_out, trainer.training_step = roll_out, training_step
    trainer.train()
    assert threads == ["rollouts_0"] * 3
    assert len(logged(trainer, "seconds_wait")) == 3


def test_it_learns_to_write_even_numbers(tmp_path):
    trainer = overlapped(
        tmp_path, max_steps=14, per_device_train_batch_size=64, adam_epsilon=1e-8,
        trainer={"prompts": prompts(16), "num_generations": 8},
    )  # fmt: skip
    trainer.train()
    rewards = logged(trainer, "reward")
    assert sum(rewards[-3:]) / 3 > rewards[0] + 0.25


# Resuming.


def saving_run(folder, *, overlap=True, **changes):
    trainer = overlapped(
        folder, max_steps=4, save_strategy="steps", save_steps=2, trainer={
            "callbacks": [CheckpointCallback()], "overlap": overlap,
            "samples_path": folder / "samples.jsonl",
            "selection": Selection(max_refills=1), "rewards": {"even": (mostly_even, 1.0)},
        },
    )  # fmt: skip
    folder.mkdir(exist_ok=True)
    rollouts = remember_rollouts(trainer)
    trainer.train(**changes)
    return trainer, rollouts


def mostly_even(completions, **_):
    return [round(share) for share in even_share(completions)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(folder, trainer, rollouts) of four steps without a stop."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, *saving_run(folder)


def checkpoint_of(whole, folder):
    """A copy of what step 2 left, to be changed, and the file of the rollout sampled ahead."""
    start = shutil.copytree(whole[0] / "checkpoint-2", folder / "checkpoint-2")
    return {"resume_from_checkpoint": str(start)}, start / PREFETCH_FILE


def test_a_resumed_run_trains_on_the_rollout_that_had_been_sampled_ahead(whole, tmp_path):
    """Its policy is gone, so the completions are in the checkpoint; refills are, too."""
    folder, trainer, expected = whole
    assert not (folder / "checkpoint-4" / PREFETCH_FILE).exists()  # nothing comes after
    start, _ = checkpoint_of(whole, tmp_path)
    resumed, found = saving_run(tmp_path / "run", **start)
    assert torch.equal(weights(resumed.model), weights(trainer.model))
    late = [rollout for rollout in expected if rollout.policy_version >= 1]
    assert [r.policy_version for r in found] == [r.policy_version for r in late]
    assert [r.texts for r in found] == [r.texts for r in late]
    assert len(found) > 2  # refills among them
    for name in ("loss", "staleness", "reward", "correction"):
        assert logged(resumed, name) == logged(trainer, name), name
    samples = [read_log(path / "samples.jsonl") for path in (folder, tmp_path / "run")]
    assert samples[1] == [sample for sample in samples[0] if sample["step"] > 2]


def test_without_that_rollout_a_resumed_run_would_end_elsewhere(whole, tmp_path):
    start, ahead = checkpoint_of(whole, tmp_path)
    ahead.unlink()
    resumed, _ = saving_run(tmp_path / "run", **start)
    assert (weights(resumed.model) - weights(whole[1].model)).abs().max() > 1e-4
    assert logged(resumed, "staleness")[2:] == [0.0, 1.0]


def test_another_rollout_than_the_next_is_refused(whole, tmp_path):
    start, ahead = checkpoint_of(whole, tmp_path)
    torch.save({**torch.load(ahead), "number": 3}, ahead)
    with pytest.raises(DataError, match="expected rollout 2 to have been generated ahead, found 3"):
        saving_run(tmp_path / "run", **start)


def test_a_rollout_that_is_too_old_is_refused(whole, tmp_path):
    start, ahead = checkpoint_of(whole, tmp_path)
    saved = torch.load(ahead)
    saved["rollouts"][0]["policy_version"] = 0
    torch.save(saved, ahead)
    with pytest.raises(RuntimeError, match="arrived at step 2: 2 rollouts later, where 1"):
        saving_run(tmp_path / "run", **start)


# The thread.


def no_thread_is_left():
    return not [t for t in threading.enumerate() if t.name.startswith("rollouts")]


def test_what_the_thread_raises_ends_the_run_with_its_traceback(tmp_path):
    trainer = overlapped(tmp_path, max_steps=4)
    original, calls = trainer.rollouts.roll_out, []

    def broken_judge(*arguments, **settings):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyError("the third rollout")
        return original(*arguments, **settings)

    trainer.rollouts.roll_out = broken_judge
    with pytest.raises(KeyError, match="the third rollout") as error:
        trainer.train()
    assert "broken_judge" in "".join(traceback.format_exception(error.value))
    assert trainer.state.global_step == 2
    assert no_thread_is_left()


def test_an_error_in_training_stops_the_thread_within_a_token(tmp_path):
    """Answers of 150 tokens, and training fails once the first of them is there."""
    long = Sampling(150, (), 1.0)
    trainer = overlapped(tmp_path, max_steps=2, trainer={"sampling": long})
    forwards, began = [], threading.Event()

    def count(*_):
        forwards.append(threading.current_thread().name)
        if len(forwards) > 152:  # of the second rollout
            began.set()

    trainer.rollouts.frozen.model.register_forward_pre_hook(count)

    def fail(*_):
        assert began.wait(20)
        raise KeyboardInterrupt

    trainer.training_step = fail
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert 150 < len(forwards) < 290
    assert no_thread_is_left()


def test_evaluation_in_between_changes_nothing(tmp_path):
    """It waits for the thread, and the verdicts that are counted there stay with the rollout."""
    plain = overlapped(tmp_path / "plain")
    evaluated = overlapped(
        tmp_path / "evaluated", eval_strategy="steps", eval_steps=1,
        trainer={"eval_prompts": prompts(3, seed=4)},
    )  # fmt: skip
    for trainer in (plain, evaluated):
        trainer.train()
    assert torch.equal(weights(plain.model), weights(evaluated.model))
    assert len(logged(evaluated, "eval_reward")) == 3
    assert no_thread_is_left()


def test_a_reward_sees_the_state_of_the_policy_that_sampled(tmp_path):
    """Not that of the moment, which depends on how far the trainer is."""

    def by_step(completions, *, trainer_state, **_):
        return [float(trainer_state.global_step) for _ in completions]

    trainer = overlapped(tmp_path, max_steps=4, trainer={"rewards": {"step": (by_step, 1.0)}})
    trainer.train()
    assert logged(trainer, "reward") == [0.0, 0.0, 1.0, 2.0]


def test_in_half_precision_the_thread_computes_as_the_trainer_does(tmp_path):
    """Autocast is the thread's own: without it the gap would be that of two number formats."""
    found = []
    for overlap in (False, True):
        trainer = overlapped(
            tmp_path / str(overlap), bf16=True, max_steps=1, trainer={"overlap": overlap}
        )
        rollouts = remember_rollouts(trainer)
        trainer.train()
        found.append([completion for rollout in rollouts for completion in rollout.flat])
    assert found[0] == found[1]


def test_weights_that_do_not_train_are_not_copied(tmp_path):
    from peft import LoraConfig, get_peft_model

    from posttrain.packed.prepare import prepare

    model = make_model()
    prepare(model)
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    trainer = overlapped(tmp_path, model=model)
    pairs = zip(model.named_parameters(), trainer.rollouts.frozen.model.parameters(), strict=True)
    for (name, weight), copied in pairs:
        assert (weight is copied) == ("lora_" not in name)
    trainer.train()
    assert logged(trainer, "staleness") == [0.0, 1.0, 1.0]
    assert max(logged(trainer, "log_rho_p99")[1:]) > 1e-4


# What is refused.


def test_without_a_correction_it_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="with overlap, completions come from another"):
        overlapped(tmp_path, trainer={"correction": None})


@pytest.mark.parametrize(("ranks", "engine"), [(2, "MULTI_CPU"), (1, "DEEPSPEED")])
def test_several_ranks_and_deepspeed_are_refused(ranks, engine):
    from accelerate.utils import DistributedType

    trainer = SimpleNamespace(
        args=SimpleNamespace(world_size=ranks),
        accelerator=SimpleNamespace(distributed_type=DistributedType[engine]),
        state=None,
    )
    with pytest.raises(ConfigError, match=f"expected one process.*found {ranks} .{engine}"):
        FrozenPolicy(trainer, SimpleNamespace(engine=None, tokenizer=None))
