"""PartialRolloutTrainer: ordinary rollouts as its limit, what trains of an answer, resuming."""

import json
import shutil
from functools import partial

import pytest
import torch

from posttrain.advantages import dr_grpo_advantages, reinforce_pp_advantages
from posttrain.errors import ConfigError, DataError
from posttrain.losses import kimi_policy_loss
from posttrain.rollouts.partial import PartialRollouts
from posttrain.rollouts.prompts import PrioritizedSampler, prompt_sampler
from posttrain.rollouts.sampling import Sampling
from posttrain.run.folder import read_log
from posttrain.trainers import partial as partial_trainer
from posttrain.trainers.fit import fit, training_arguments
from posttrain.trainers.partial import OptimizerReset, PartialRolloutTrainer
from posttrain.trainers.rl import RLTrainer
from tests.conftest import EOS, make_model, make_tokenizer
from tests.trainers.tiny import (
    ANSWERS_PER_PROMPT,
    BATCH,
    MAX_ANSWER,
    Config,
    arguments,
    even_share,
    logged,
    prompts,
    weights,
)

SAMPLING = Sampling(MAX_ANSWER, (EOS, *range(2, 30)))  # a third of the tokens ends an answer
KIMI = {
    "rewards": {"even": (even_share, 1.0)}, "sampling": SAMPLING, "per": "sequence",
    "num_generations": ANSWERS_PER_PROMPT, "advantage": dr_grpo_advantages,
    "loss": partial(kimi_policy_loss, tau=0.1),
}  # fmt: skip


def start(folder, parts=None, *, model=None, trainer=None, **changes):
    """parts: of PartialRolloutTrainer; None: the plain RLTrainer."""
    args = arguments(folder, **{"per_device_train_batch_size": BATCH["rl"], **changes})
    own = {**KIMI, "prompts": prompts(40), "tokenizer": make_tokenizer(), **(trainer or {})}
    if parts is None:
        return RLTrainer(model or make_model(), args, **own)
    return PartialRolloutTrainer(model or make_model(), args, parts=parts, **own)


@pytest.mark.parametrize("updates", [1, 2])
def test_without_a_limit_it_is_rltrainer_bit_by_bit(updates, tmp_path):
    """With two accumulation steps, and the prompts in order."""
    found = []
    for parts in (None, PartialRollouts()):
        one = start(
            tmp_path, parts, max_steps=4, gradient_accumulation_steps=2,
            per_device_train_batch_size=8, trainer={"updates_per_rollout": updates},
        )  # fmt: skip
        one.train()
        found.append(one)
    assert torch.equal(weights(found[0].model), weights(found[1].model))
    for name in ("loss", "reward", "sampler_gap", "groups_without_spread"):
        assert logged(found[0], name) == logged(found[1], name)
    assert logged(found[1], "on_policy_tokens") == [1.0] * (4 // updates)


def remember(trainer):
    """All groups that train, as they come from the loader, rollout by rollout."""
    seen = []
    original = trainer._finish_batch
    trainer._finish_batch = lambda groups: (seen.append(groups), original(groups))[1]
    return seen


def test_a_group_trains_when_all_its_answers_are_finished_and_is_scored_once(tmp_path):
    """Of what is started, all is scored once, in the order in which it is finished."""
    scored = []

    def reward(completions, *, prompts, **_):
        scored.extend(prompts[::ANSWERS_PER_PROMPT])
        assert all(len(text.split()) <= MAX_ANSWER for text in completions)
        return even_share(completions)

    trainer = start(
        tmp_path, PartialRollouts(2), max_steps=6, learning_rate=1e-4,
        trainer={"rewards": {"even": (reward, 1.0)}},
    )  # fmt: skip
    batches = remember(trainer)
    trainer.train()
    started = 6 * BATCH["rl"] // ANSWERS_PER_PROMPT
    waiting = trainer.loader.open
    assert 0 < len(waiting) < started
    assert len(scored) == len(set(scored)) == started - len(waiting)
    sizes = [len(batch) for batch in batches]
    assert len(set(sizes)) > 1  # it depends on how many are finished
    shares = logged(trainer, "finished_groups")
    assert sum(shares) * BATCH["rl"] / ANSWERS_PER_PROMPT == pytest.approx(len(scored))


def test_only_tokens_of_the_newest_policy_have_a_gradient_by_default(tmp_path):
    """And with max_staleness 1 those of the policy before it too."""
    for staleness in (0, 1):
        trained = []

        def spy(logps, old_logps, advantages, mask, trained=trained):
            loss = kimi_policy_loss(logps, old_logps, advantages, mask, tau=0.1)
            (gradient,) = torch.autograd.grad(loss.sum(), logps, retain_graph=True)
            trained.append((gradient != 0, mask))
            return loss

        trainer = start(tmp_path, PartialRollouts(2, staleness), max_steps=4, trainer={"loss": spy})
        batches = remember(trainer)
        trainer.train()
        ages = [ages for batch in batches for group in batch for ages in group["ages"]]
        masks = [row for _, mask in trained for row in mask]
        assert max(map(max, ages)) > 1
        for answer, row in zip(ages, masks, strict=True):
            assert row[: len(answer)].tolist() == [float(age <= staleness) for age in answer]
        assert any(gradient.any() for gradient, _ in trained)
        assert not any((gradient & (mask == 0)).any() for gradient, mask in trained)


def test_older_tokens_start_from_the_policy_that_drew_them(tmp_path):
    """With updates: at a rollout's first step newest tokens have log-ratio 0, older ones not."""
    gaps = []

    def spy(logps, old_logps, advantages, mask):
        gaps.append(((logps - old_logps).detach().abs(), mask))
        return kimi_policy_loss(logps, old_logps, advantages, mask, tau=0.1)

    settings = {"loss": spy, "updates_per_rollout": 2}
    trainer = start(tmp_path, PartialRollouts(2, 9), max_steps=8, trainer=settings)
    batches = remember(trainer)
    trainer.train()
    newest, older = [], []
    for batch, (gap, _) in list(zip(batches, gaps, strict=True))[::2]:
        ages = [ages for group in batch for ages in group["ages"]]
        for answer, row in zip(ages, gap, strict=True):
            for age, value in zip(answer, row.tolist(), strict=False):
                (older if age else newest).append(value)
    assert max(newest) < 1e-5
    assert sum(value > 1e-3 for value in older) > len(older) / 2


def test_the_ratio_at_the_first_update_is_of_the_newest_tokens(tmp_path):
    """Older ones train too, and have moved since: that is their staleness, and no fault."""
    trainer = start(tmp_path, PartialRollouts(2, 9), max_steps=4, learning_rate=3e-2)
    trainer.train()
    assert logged(trainer, "ratio_outside") == [0.0] * 4
    assert logged(trainer, "sampler_gap")[-1] > 0.1


def test_answers_without_a_token_that_trains_do_not_count(tmp_path):
    """The loss is a mean over the answers, or the tokens, that train."""
    trainer = start(tmp_path, PartialRollouts(2, 0))
    groups = [{"ages": [[2, 1, 0], [0, 0]]}, {"ages": [[1]]}]
    assert trainer.count_items(groups) == 2
    trainer.per = "token"
    assert trainer.count_items(groups) == 3


def test_it_learns_to_write_even_numbers_from_answers_in_parts(tmp_path):
    """From about a half; few answers are longer than a part, and the optimizer starts anew."""
    trainer = start(
        tmp_path, PartialRollouts(8), max_steps=24, per_device_train_batch_size=64,
        adam_epsilon=1e-8, learning_rate=5e-3,
        trainer={"prompts": prompts(64), "updates_per_rollout": 2, "num_generations": 8,
                 "callbacks": [OptimizerReset(2)]},
    )  # fmt: skip
    trainer.train()
    rewards = logged(trainer, "reward")
    assert sum(rewards[-3:]) > sum(rewards[:3]) + 0.6
    assert min(logged(trainer, "on_policy_tokens")) < 1


# The sampler.


def test_pass_rates_are_measured_once_and_are_those_of_the_starting_model(tmp_path):
    own = {"success_of": "even", "sampler": partial(prompt_sampler, seed=0, curriculum_rollouts=2)}
    calls = []
    for _ in range(2):
        trainer = start(tmp_path / "run", PartialRollouts(4), trainer=own)
        original = trainer._roll_out

        def count(*arguments, original=original, **settings):
            calls.append(arguments)
            return original(*arguments, **settings)

        trainer._roll_out = count
        trainer.add_pass_rates(3, tmp_path / "rates")
        rates = trainer.train_dataset["pass_rate"]
    assert len(calls) == 1
    assert len(rates) == 40
    assert len(set(rates)) > 10
    trainer.train()
    (path,) = (tmp_path / "rates").glob("*.json")
    assert json.loads(path.read_text()) == list(rates)
    # Trained, it is another model: measured anew.
    other = start(tmp_path / "run", PartialRollouts(4), model=trainer.model, trainer=own)
    other.add_pass_rates(3, tmp_path / "rates")
    assert len(list((tmp_path / "rates").glob("*.json"))) == 2
    assert list(other.train_dataset["pass_rate"]) != list(rates)


def odd_share(completions, *, scale=1.0, **_):
    return [scale * (1.0 - share) for share in even_share(completions)]


def test_pass_rates_of_another_reward_or_other_golds_are_measured_anew(tmp_path, monkeypatch):
    """A reward is another by its name and by what is bound to it."""
    measured = []

    def measure(*_, **__):
        measured.append(1)
        return [0.5] * 40

    monkeypatch.setattr(partial_trainer, "measure_pass_rates", measure)
    trainer = start(tmp_path, PartialRollouts(4), trainer={"success_of": "even"})
    data, half = trainer.train_dataset, partial(odd_share, scale=0.5)
    other_golds = data.remove_columns("target").add_column("target", [0] * 40)
    runs = ((even_share, data), (odd_share, data), (half, data), (half, other_golds))
    for count, (reward, rows) in enumerate(runs, start=1):
        for _ in range(2):  # the second time they are read
            trainer.rewards, trainer.train_dataset = {"even": (reward, 1.0)}, rows
            trainer.add_pass_rates(3, tmp_path / "rates")
        assert len(measured) == count


# Resuming.


def run(folder, **changes):
    """Four rollouts of two steps, saved after each, with unfinished answers and a sampler."""
    config = Config(
        output_dir=str(folder), save_steps=2, max_steps=8, save_total_limit=9,
        per_device_train_batch_size=BATCH["rl"], learning_rate=3e-3, **changes,
    )  # fmt: skip
    folder.mkdir(exist_ok=True)
    trainer = PartialRolloutTrainer(
        make_model(), training_arguments(config), **KIMI, prompts=prompts(80),
        tokenizer=make_tokenizer(), parts=PartialRollouts(2, 1), updates_per_rollout=2,
        sampler=lambda rows: PrioritizedSampler(len(rows), seed=0), success_of="even",
        callbacks=[OptimizerReset(2)], samples_path=folder / "samples.jsonl",
    )  # fmt: skip
    fit(trainer, config)
    return trainer


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    return folder, run(folder)


@pytest.fixture
def stopped(whole, tmp_path):
    """What a run that died in its sixth step left behind."""
    shutil.copytree(whole[0], tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "model")
    for step in (6, 8):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / f"checkpoint-{step}")
    return tmp_path / "run"


def state_file(folder):
    return folder / "checkpoints" / "checkpoint-4" / "unfinished_rank0.json"


def without_manifest(path):
    """The manifest would have the checkpoint refused as a whole."""
    manifest = path.parent / "manifest.json"
    entries = json.loads(manifest.read_text())
    del entries["files"][path.name]
    manifest.write_text(json.dumps(entries))


def test_a_run_resumed_in_the_middle_of_answers_ends_with_the_same_bits(whole, stopped):
    folder, expected = whole
    state = json.loads(state_file(stopped).read_text())
    answers = [answer for group in state["open"] for answer in group["answers"]]
    assert sum(answer["finish_reason"] == "unfinished" for answer in answers) > 3
    assert state["sampler"]["found"]
    resumed = run(stopped, resume=True)
    assert torch.equal(weights(resumed.model), weights(expected.model))
    for name in ("loss", "on_policy_tokens", "unfinished_answers", "finished_groups"):
        assert logged(resumed, name) == logged(expected, name)
    assert read_log(stopped / "samples.jsonl") == read_log(folder / "samples.jsonl")
    assert resumed.loader.state_dict() == expected.loader.state_dict()


def test_without_its_unfinished_answers_a_resumed_run_would_end_elsewhere(whole, stopped):
    """The control: the same weights, prompts and step, and nothing in the buffer."""
    path = state_file(stopped)
    state = json.loads(path.read_text())
    path.write_text(json.dumps({**state, "open": []}))
    without_manifest(path)
    resumed = run(stopped, resume=True)
    assert (weights(resumed.model) - weights(whole[1].model)).abs().max() > 1e-5


def test_the_unfinished_answers_are_part_of_the_checkpoint(stopped):
    """In its manifest; a checkpoint without them, or of other ranks, is not resumed from."""
    path = state_file(stopped)
    assert path.name in json.loads((path.parent / "manifest.json").read_text())["files"]
    state = json.loads(path.read_text())
    without_manifest(path)
    path.write_text(json.dumps({**state, "world_size": 2}))
    with pytest.raises(DataError, match="those of 1 processes before rollout 2, found 2 and 2"):
        run(stopped, resume=True)
    path.unlink()
    with pytest.raises(DataError, match=r"unfinished_rank0.json is missing"):
        run(stopped, resume=True)


# The optimizer.


def test_each_iteration_starts_with_an_empty_optimizer(tmp_path):
    """Adam counts its steps: 1 2 1 2 with a reset, 1 2 3 4 without."""
    for callbacks, expected in (([OptimizerReset(2)], [1, 2, 1, 2]), ([], [1, 2, 3, 4])):
        trainer = start(
            tmp_path, PartialRollouts(), max_steps=4,
            trainer={"callbacks": callbacks, "updates_per_rollout": 2},
        )  # fmt: skip
        steps = []

        def note(*arguments, trainer=trainer, steps=steps, original=trainer.training_step):
            states = trainer.optimizer.state.values()
            steps.append(1 + max((int(state["step"]) for state in states), default=0))
            return original(*arguments)

        trainer.training_step = note
        trainer.train()
        assert steps == expected


def test_what_it_cannot_do_is_refused_before_the_first_step(tmp_path):
    for name in ("selection", "engine", "overlap_rollouts", "reward_kl_coef"):
        with pytest.raises(ConfigError, match=f"{name}: PartialRolloutTrainer has no such setting"):
            start(tmp_path, PartialRollouts(4), trainer={name: None})
    with pytest.raises(ConfigError, match="found one of single tokens"):
        start(tmp_path, PartialRollouts(4), trainer={"advantage": reinforce_pp_advantages})
    with pytest.raises(ConfigError, match=r"success_of: expected the name of a reward \(even\)"):
        start(tmp_path, PartialRollouts(4), trainer={"success_of": "accuracy"})
    with pytest.raises(ConfigError, match="take 10 rollouts, and the data has 40 prompts"):
        start(tmp_path, PartialRollouts(1), per_device_train_batch_size=32)
    with pytest.raises(ConfigError, match="at least 1 step, found 0"):
        OptimizerReset(0)
