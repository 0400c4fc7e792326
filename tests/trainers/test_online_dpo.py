"""Online DPO: pairs from the policy's own completions, and the loss of exactly those pairs."""

import math
import shutil

import pytest
import torch

from posttrain.errors import ConfigError
from posttrain.losses import dpo_loss, hinge_loss, kl_k3
from posttrain.models.load import load_model
from posttrain.rollouts.group import Group
from posttrain.rollouts.sampling import Completion, Sampling
from posttrain.run.options import bind
from posttrain.trainers.fit import fit, training_arguments
from posttrain.trainers.online_dpo import best_and_worst
from tests.conftest import EOS, make_model
from tests.trainers import tiny
from tests.trainers.tiny import (
    Config,
    arguments,
    logged,
    online_dpo_trainer,
    prompts,
    weights,
)

DPO = bind(dpo_loss, beta=0.3)
BATCH = 16


def make_trainer(folder, *, model=None, own=None, **changes):
    args = arguments(folder, **{"per_device_train_batch_size": BATCH, **changes})
    return online_dpo_trainer(
        model or make_model(), args, **{"prompts": prompts(32), "loss": DPO, **(own or {})}
    )


def a_group(rewards, texts=None):
    texts = texts or [[5 + i] for i in range(len(rewards))]
    completions = [Completion(ids, [0.0] * len(ids), [0.0] * len(ids), "stop") for ids in texts]
    return Group({"prompt_ids": [3]}, completions, torch.tensor(rewards))


@pytest.mark.parametrize(
    ("rewards", "texts", "pair"),
    [
        ([0.1, 0.7], None, (1, 0)),
        ([0.5, 0.2, 0.9, 0.2], None, (2, 1)),
        ([math.nan, 0.2, 0.4], None, (2, 1)),
        ([0.5, 0.5], None, None),
        ([math.nan, 0.5], None, None),
        ([math.nan, math.nan], None, None),
        ([0.1, 0.7], [[8], [8]], None),  # one completion, two opinions
    ],
)
def test_the_pair_of_a_prompt_is_its_best_and_its_worst_completion(rewards, texts, pair):
    assert best_and_worst(a_group(rewards, texts)) == pair


def test_loss_and_gradient_are_those_of_plain_forwards_on_the_sampled_pairs(tmp_path):
    """After two steps away from the reference, at temperature 0.8: DPO written out."""
    sampling = Sampling(tiny.MAX_COMPLETION, (EOS, 2, 3, 4, 5), temperature=0.8)
    trainer = make_trainer(tmp_path, max_steps=2, own={"sampling": sampling})
    trainer.train()
    groups = trainer.rollouts.groups(2)
    (pairs,) = trainer.rollouts.batches(groups, 2)
    trainer.objective.prepare(pairs, trainer, updates=1)
    trainer.model.zero_grad()
    count = trainer.count_items(pairs)
    loss = trainer.microbatch_loss(trainer.model.train(), pairs) / count
    loss.backward()

    policy, reference = trainer.model, make_model()
    found = {n: p.grad.clone() for n, p in policy.named_parameters()}
    policy.zero_grad()
    terms = []
    for group in pairs:
        assert group.rewards[0] > group.rewards[1]
        h = [
            summed(policy, group, i, 0.8) - summed(reference, group, i, 0.8).detach()
            for i in (0, 1)
        ]
        terms.append(-torch.nn.functional.logsigmoid(0.3 * (h[0] - h[1])))
    expected = torch.stack(terms).mean()
    expected.backward()
    assert 1 < count <= BATCH // 2
    assert abs(expected.item() - math.log(2)) > 1e-3
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    for name, parameter in policy.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, atol=1e-5, rtol=0)


def summed(model, group, index, temperature):
    """Summed log-prob of a completion by an ordinary forward."""
    prompt, ids = group.prompt["prompt_ids"], group.completions[index].token_ids
    logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1] / temperature
    return logits.log_softmax(-1).gather(-1, torch.tensor(ids)[:, None]).sum()


def test_how_a_batch_is_cut_changes_nothing(tmp_path):
    """Whole; in four accumulation steps; one pair, larger than its limit, at a time."""
    ends = []
    cuts = ({}, {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4},
            {"own": {"max_tokens_per_microbatch": 8}})  # fmt: skip
    for cut in cuts:
        trainer = make_trainer(tmp_path, **cut)
        trainer.train()
        ends.append(weights(trainer.model))
        assert logged(trainer, "loss")[0] == pytest.approx(math.log(2), abs=1e-5)
    assert (ends[0] - weights(make_model())).abs().max() > 1e-3
    for end in ends[1:]:
        torch.testing.assert_close(end, ends[0], atol=1e-5, rtol=0)


def test_ties_and_unscored_prompts_are_dropped_and_counted(tmp_path):
    """Of eight prompts two get equal rewards and two none: four pairs are left."""

    def judged(completions, *, prompts, **_):
        place = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
        scores = [float(row % 2) for row in range(len(completions))]
        kinds = [place[prompt] for prompt in prompts]
        return [
            1.0 if kind < 2 else None if kind < 4 else score
            for kind, score in zip(kinds, scores, strict=True)
        ]

    trainer = make_trainer(tmp_path, max_steps=1, own={"rewards": {"judged": (judged, 1.0)}})
    batches, original = [], trainer.microbatch_loss
    trainer.microbatch_loss = lambda model, groups: (
        batches.extend(groups), original(model, groups)
    )[1]  # fmt: skip
    trainer.train()
    assert logged(trainer, "pairs_tied") == [0.25]
    assert logged(trainer, "pairs_unscored") == [0.25]
    assert len(batches) == 4
    assert all(group.rewards.tolist() == [1.0, 0.0] for group in batches)


def test_a_step_without_any_pair_trains_nothing(tmp_path):
    def same(completions, **_):
        return [1.0] * len(completions)

    trainer = make_trainer(tmp_path, max_steps=1, own={"rewards": {"same": (same, 1.0)}})
    trainer.train()
    assert logged(trainer, "pairs_tied") == [1.0]
    assert logged(trainer, "loss") == [0.0]
    assert torch.equal(weights(trainer.model), weights(make_model()))


def test_it_learns_to_write_even_numbers(tmp_path):
    trainer = make_trainer(
        tmp_path, max_steps=20, adam_epsilon=1e-8, per_device_train_batch_size=32,
        own={"loss": bind(dpo_loss, beta=0.1)},
    )  # fmt: skip
    trainer.train()
    rewards = logged(trainer, "reward")
    assert 0.2 < rewards[0] < 0.7
    assert sum(rewards[-3:]) / 3 > rewards[0] + 0.2
    assert sum(logged(trainer, "margin")[-5:]) > 0
    assert max(logged(trainer, "sampler_gap")) < 1e-4


@pytest.mark.parametrize("peft", [False, True])
def test_a_resumed_run_ends_as_one_without_a_stop(peft, base, tmp_path):
    def run(folder, **settings):
        lora = {"use_peft": True, "lora_r": 4} if peft else {}
        config = Config(
            model_name_or_path=str(base), output_dir=str(folder), save_steps=2,
            per_device_train_batch_size=BATCH, **lora, **settings,
        )  # fmt: skip
        model = load_model(config, quiet=True)
        trainer = online_dpo_trainer(model, training_arguments(config), prompts=prompts(32))
        fit(trainer, config)
        return trainer

    whole = run(tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "model")
    (tmp_path / "again" / "checkpoints" / "checkpoint-4" / "manifest.json").unlink()
    resumed = run(tmp_path / "again", resume=True)
    assert (resumed.reference is None) == peft  # the adapter switched off is the reference
    torch.testing.assert_close(weights(resumed.model), weights(whole.model), atol=1e-6, rtol=0)
    assert logged(resumed, "loss")[-1] == pytest.approx(logged(whole, "loss")[-1], abs=1e-6)


def test_settings_that_make_no_pairs_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="at least 2 to make pairs, found 1"):
        make_trainer(tmp_path, own={"num_generations": 1})
    with pytest.raises(ConfigError, match="expected arguments among chosen, rejected, ref_chosen"):
        make_trainer(tmp_path, own={"loss": kl_k3})
    make_trainer(tmp_path, own={"loss": hinge_loss})


def test_pairs_may_come_from_a_restricted_sampler(tmp_path):
    """No correction is needed: a preference holds whoever wrote the two."""
    sampling = Sampling(8, (EOS,), top_p=0.9, vocabulary=97)
    make_trainer(tmp_path, max_steps=1, own={"sampling": sampling}).train()
