"""RL over partial rollouts: ordinary ones as its limit, which tokens train, resuming."""

import json
import shutil
from functools import partial

import pytest
import torch

from posttrain.advantages import dr_grpo_advantages, reinforce_pp_advantages
from posttrain.errors import ConfigError, DataError
from posttrain.losses import kimi_policy_loss
from posttrain.rollouts import partial_source
from posttrain.rollouts.group import Group
from posttrain.rollouts.options import NothingToLearnError
from posttrain.rollouts.partial import Parts
from posttrain.rollouts.prompts import PrioritizedSampler, prompt_sampler
from posttrain.rollouts.sampling import Completion, Sampling
from posttrain.run.folder import read_log
from posttrain.trainers.callbacks import OptimizerReset
from posttrain.trainers.fit import fit, training_arguments
from posttrain.trainers.objective import Objective
from tests.conftest import EOS, make_model, make_tokenizer
from tests.trainers.tiny import (
    BATCH,
    MAX_COMPLETION,
    NUM_GENERATIONS,
    Config,
    arguments,
    even_share,
    logged,
    partial_trainer,
    prompts,
    rl_trainer,
    weights,
)

SAMPLING = Sampling(MAX_COMPLETION, (EOS, *range(2, 30)))  # a third of the tokens ends a completion
KIMI = {
    "rewards": {"even": (even_share, 1.0)}, "sampling": SAMPLING, "per": "sequence",
    "num_generations": NUM_GENERATIONS, "advantage": dr_grpo_advantages,
    "loss": partial(kimi_policy_loss, tau=0.1),
}  # fmt: skip


def start(folder, parts=None, *, model=None, trainer=None, **changes):
    """parts: of PartialRollouts; None: the ordinary Rollouts."""
    args = arguments(folder, **{"per_device_train_batch_size": BATCH["rl"], **changes})
    own = {**KIMI, "prompts": prompts(40), "tokenizer": make_tokenizer(), **(trainer or {})}
    if parts is None:
        return rl_trainer(model or make_model(), args, **own)
    return partial_trainer(model or make_model(), args, parts=parts, **own)


@pytest.mark.parametrize("updates", [1, 2])
def test_without_a_limit_it_is_rltrainer_bit_by_bit(updates, tmp_path):
    """With two accumulation steps, and the prompts in order."""
    found = []
    for parts in (None, Parts()):
        one = start(
            tmp_path, parts, max_steps=4, gradient_accumulation_steps=2,
            per_device_train_batch_size=8, trainer={"updates_per_rollout": updates},
        )  # fmt: skip
        one.train()
        found.append(one)
    assert torch.equal(weights(found[0].model), weights(found[1].model))
    for name in ("loss", "reward", "sampler_gap", "reward_std_zero"):
        assert logged(found[0], name) == logged(found[1], name)
    assert logged(found[1], "on_policy_tokens") == [1.0] * (4 // updates)


def remember(trainer):
    """All groups that train, accumulation step by accumulation step."""
    seen = []
    original = trainer.rollouts.batches

    def batches(groups, number):
        found = original(groups, number)
        seen.extend(found)
        trainer.numbers = [*getattr(trainer, "numbers", []), *[number] * len(found)]
        return found

    trainer.rollouts.batches = batches
    return seen


def ages(groups, number):
    """For each completion, how many rollouts before this one its tokens were sampled; the stand-in
    of a step without groups has one token that never trains."""
    completions = [c for group in groups for c in group.completions]
    return [[number - v for v in c.policy_versions] or [99] for c in completions]


def test_a_group_trains_when_all_its_completions_are_finished_and_is_scored_once(tmp_path):
    """Of what is started, all is scored once, in the order in which it is finished."""
    scored = []

    def reward(completions, *, prompts, **_):
        scored.extend(prompts[::NUM_GENERATIONS])
        assert all(len(text.split()) <= MAX_COMPLETION for text in completions)
        return even_share(completions)

    trainer = start(
        tmp_path, Parts(2), max_steps=6, learning_rate=1e-4,
        trainer={"rewards": {"even": (reward, 1.0)}},
    )  # fmt: skip
    batches = remember(trainer)
    trainer.train()
    started = 6 * BATCH["rl"] // NUM_GENERATIONS
    waiting = trainer.rollouts.open
    assert 0 < len(waiting) < started
    assert len(scored) == len(set(scored)) == started - len(waiting)
    sizes = [len(batch) for batch in batches]
    assert len(set(sizes)) > 1  # it depends on how many are finished
    shares = logged(trainer, "finished_groups")
    assert sum(shares) * BATCH["rl"] / NUM_GENERATIONS == pytest.approx(len(scored))


def test_only_tokens_of_the_newest_policy_have_a_gradient_by_default(tmp_path):
    """And with max_staleness 1 those of the policy before it too."""
    for staleness in (0, 1):
        trained = []

        def spy(logps, old_logps, advantages, mask, trained=trained):
            loss = kimi_policy_loss(logps, old_logps, advantages, mask, tau=0.1)
            (gradient,) = torch.autograd.grad(loss.sum(), logps, retain_graph=True)
            trained.append((gradient != 0, mask))
            return loss

        trainer = start(tmp_path, Parts(2, staleness), max_steps=4, trainer={"loss": spy})
        batches = remember(trainer)
        trainer.train()
        steps = zip(batches, trainer.numbers, strict=True)
        found = [age for batch, number in steps for age in ages(batch, number)]
        masks = [row for _, mask in trained for row in mask]
        assert max(map(max, found)) > 1
        for completion, row in zip(found, masks, strict=True):
            assert row[: len(completion)].tolist() == [
                float(age <= staleness) for age in completion
            ]
        assert any(gradient.any() for gradient, _ in trained)
        assert not any((gradient & (mask == 0)).any() for gradient, mask in trained)


def test_older_tokens_start_from_the_policy_that_sampled_them(tmp_path):
    """With updates: at a rollout's first step newest tokens have log-ratio 0, older ones not."""
    gaps = []

    def spy(logps, old_logps, advantages, mask):
        gaps.append(((logps - old_logps).detach().abs(), mask))
        return kimi_policy_loss(logps, old_logps, advantages, mask, tau=0.1)

    settings = {"loss": spy, "updates_per_rollout": 2}
    trainer = start(tmp_path, Parts(2, 9), max_steps=8, trainer=settings)
    batches = remember(trainer)
    trainer.train()
    newest, older = [], []
    steps = zip(batches, trainer.numbers, gaps, strict=True)
    for batch, number, (gap, _) in list(steps)[::2]:
        for completion, row in zip(ages(batch, number), gap, strict=True):
            for age, value in zip(completion, row.tolist(), strict=False):
                (older if age else newest).append(value)
    assert max(newest) < 1e-5
    assert sum(value > 1e-3 for value in older) > len(older) / 2


def test_the_ratio_at_the_first_update_is_of_the_newest_tokens(tmp_path):
    """Older ones train too, and have moved since: that is their staleness, and no fault."""
    trainer = start(tmp_path, Parts(2, 9), max_steps=4, learning_rate=3e-2)
    trainer.train()
    assert logged(trainer, "ratio_outside") == [0.0] * 4
    assert logged(trainer, "sampler_gap")[-1] > 0.1


def test_completions_without_a_token_that_trains_do_not_count():
    """The loss is a mean over the completions, or the tokens, that train."""

    def group(*trained):
        completions = [
            Completion([5] * len(row), [0.0] * len(row), [0.0] * len(row)) for row in trained
        ]
        made = Group({"prompt_ids": [3]}, completions, torch.zeros(len(trained)))
        made.columns["trained"] = [torch.tensor(row) for row in trained]
        return made

    groups = [group([0.0, 0.0, 1.0], [1.0, 1.0]), group([0.0])]
    assert Objective(kimi_policy_loss, per="sequence").count_items(groups) == 2
    assert Objective(kimi_policy_loss, per="token").count_items(groups) == 3


def test_it_learns_to_write_even_numbers_from_completions_in_parts(tmp_path):
    """From about a half; few completions are longer than a part, and the optimizer starts anew."""
    trainer = start(
        tmp_path, Parts(8), max_steps=24, per_device_train_batch_size=64,
        adam_epsilon=1e-8, learning_rate=5e-3,
        trainer={"prompts": prompts(64), "updates_per_rollout": 2, "num_generations": 8,
                 "callbacks": [OptimizerReset(2)]},
    )  # fmt: skip
    trainer.train()
    rewards = logged(trainer, "reward")
    assert sum(rewards[-3:]) > sum(rewards[:3]) + 0.6
    assert min(logged(trainer, "on_policy_tokens")) < 1


# The sampler.


def test_without_any_reward_the_run_ends_with_the_cause(tmp_path):
    rewards = {"judge": (lambda completions, **_: [None] * len(completions), 1.0)}
    with pytest.raises(NothingToLearnError, match="'judge': it gave None"):
        start(tmp_path, Parts(), trainer={"rewards": rewards}).train()


def test_pass_rates_are_measured_once_and_are_those_of_the_starting_model(tmp_path, monkeypatch):
    own = {
        "success_of": "even",
        "sampler": partial(prompt_sampler, seed=0, curriculum_rollouts=2),
        "pass_rate_generations": 3,
        "pass_rate_folder": tmp_path / "rates",
    }
    calls, original = [], partial_source.PartialRollouts.roll_out

    def count(self, *arguments, **settings):
        calls.append(arguments)
        return original(self, *arguments, **settings)

    monkeypatch.setattr(partial_source.PartialRollouts, "roll_out", count)
    for _ in range(2):
        trainer = start(tmp_path / "run", Parts(4), trainer=own)
        rates = trainer.rollouts.prompts["pass_rate"]
    assert len(calls) == 1
    assert len(rates) == 40
    assert len(set(rates)) > 10
    trainer.train()
    (path,) = (tmp_path / "rates").glob("*.json")
    assert json.loads(path.read_text()) == list(rates)
    # Trained, it is another model: measured anew.
    other = start(tmp_path / "run", Parts(4), model=trainer.model, trainer=own)
    assert len(list((tmp_path / "rates").glob("*.json"))) == 2
    assert list(other.rollouts.prompts["pass_rate"]) != list(rates)


def odd_share(completions, *, scale=1.0, **_):
    return [scale * (1.0 - share) for share in even_share(completions)]


def test_pass_rates_of_another_reward_or_other_golds_are_measured_anew(tmp_path, monkeypatch):
    """A reward is another by its name and by what is bound to it."""
    measured = []

    def measure(*_, **__):
        measured.append(1)
        return [0.5] * 40

    monkeypatch.setattr(partial_source, "measure_pass_rates", measure)
    data, half = prompts(40), partial(odd_share, scale=0.5)
    other_golds = data.remove_columns("target").add_column("target", [0] * 40)
    runs = ((even_share, data), (odd_share, data), (half, data), (half, other_golds))
    own = {"success_of": "even", "pass_rate_generations": 3, "pass_rate_folder": tmp_path / "rates"}
    for count, (reward, rows) in enumerate(runs, start=1):
        for _ in range(2):  # the second time they are read
            changed = {"rewards": {"even": (reward, 1.0)}, "prompts": rows}
            start(tmp_path, Parts(4), trainer=own | changed)
        assert len(measured) == count


# Resuming.


def run(folder, **changes):
    """Four rollouts of two steps, saved after each, with unfinished completions and a sampler."""
    config = Config(
        output_dir=str(folder), save_steps=2, max_steps=8, save_total_limit=9,
        per_device_train_batch_size=BATCH["rl"], learning_rate=3e-3, **changes,
    )  # fmt: skip
    folder.mkdir(exist_ok=True)
    trainer = partial_trainer(
        make_model(), training_arguments(config), **KIMI, prompts=prompts(80),
        tokenizer=make_tokenizer(), parts=Parts(2, 1), updates_per_rollout=2,
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


def test_a_run_resumed_in_the_middle_of_completions_ends_with_the_same_bits(whole, stopped):
    folder, expected = whole
    state = json.loads(state_file(stopped).read_text())
    answers = [completion for group in state["open"] for completion in group["completions"]]
    assert sum(completion["finish_reason"] == "unfinished" for completion in answers) > 3
    assert state["sampler"]["found"]
    resumed = run(stopped, resume=True)
    assert torch.equal(weights(resumed.model), weights(expected.model))
    for name in ("loss", "on_policy_tokens", "unfinished_completions", "finished_groups"):
        assert logged(resumed, name) == logged(expected, name)
    assert read_log(stopped / "samples.jsonl") == read_log(folder / "samples.jsonl")
    assert resumed.rollouts.state_dict() == expected.rollouts.state_dict()


def test_without_its_unfinished_completions_a_resumed_run_would_end_elsewhere(whole, stopped):
    """The control: the same weights, prompts and step, and nothing in the buffer."""
    path = state_file(stopped)
    state = json.loads(path.read_text())
    path.write_text(json.dumps({**state, "open": []}))
    without_manifest(path)
    resumed = run(stopped, resume=True)
    assert (weights(resumed.model) - weights(whole[1].model)).abs().max() > 1e-5


def test_the_unfinished_completions_are_part_of_the_checkpoint(stopped):
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
            tmp_path, Parts(), max_steps=4,
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
    with pytest.raises(ConfigError, match="found one of single tokens"):
        start(tmp_path, Parts(4), trainer={"advantage": reinforce_pp_advantages})
    with pytest.raises(ConfigError, match=r"success_of: expected the name of a reward \(even\)"):
        start(tmp_path, Parts(4), trainer={"success_of": "accuracy"})
    with pytest.raises(ConfigError, match="take 10 rollouts, and the data has 40 prompts"):
        start(tmp_path, Parts(1), per_device_train_batch_size=32)
    with pytest.raises(ConfigError, match="at least 1 step, found 0"):
        OptimizerReset(0)
