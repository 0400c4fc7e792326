"""PPOTrainer: it learns, is REINFORCE with its parts switched off, and resumes with its critic."""

import math
import shutil
from dataclasses import replace
from functools import partial

import pytest
import torch
from transformers import AutoModelForCausalLM

from posttrain.advantages import gae
from posttrain.errors import ConfigError, DataError
from posttrain.losses import adaptive_kl_coef, clipped_policy_loss
from posttrain.models.load import load_model
from posttrain.models.reward_model import load_reward_model
from posttrain.packed.scalar import critic_of
from posttrain.rollouts.options import Selection
from posttrain.trainers.fit import fit, training_arguments
from posttrain.trainers.ppo import CRITIC_FILE
from tests.conftest import make_model, make_tokenizer
from tests.trainers import tiny
from tests.trainers.tiny import Config, arguments, even_share, logged, prompts, rl_trainer, weights

SAMPLING = {"max_tokens": 10, "stop_ids": (1, 2, 3, 4, 5)}
ANSWERS_PER_STEP = 12
MONTE_CARLO = {"estimator": partial(gae, gamma=1.0, lam=1.0), "normalise": lambda a, _: a}


def own_critic(base, **settings):
    config = Config(model_name_or_path=str(base), **settings)
    return load_reward_model(config, make_tokenizer(), quiet=True)


def settings_of(**changes):
    from posttrain.rollouts.sampling import Sampling

    return {
        "prompts": prompts(48), "tokenizer": make_tokenizer(), "sampling": Sampling(**SAMPLING),
        "rewards": {"even": (even_share, 1.0)}, "epochs": 1, **changes,
    }  # fmt: skip


def ppo_trainer(folder, *, model=None, own=None, **changes):
    model = make_model() if model is None else model
    args = arguments(folder, **{"per_device_train_batch_size": ANSWERS_PER_STEP, **changes})
    return tiny.ppo_trainer(model, args, **settings_of(**(own or {})))


def remember_rollouts(trainer):
    """A list that fills with the groups of each rollout, once they are ready to be trained on."""
    rollouts, original = [], trainer.objective.prepare

    def prepare(groups, *arguments, **settings):
        original(groups, *arguments, **settings)
        rollouts.append([replace(group, columns=dict(group.columns)) for group in groups])

    trainer.objective.prepare = prepare
    return rollouts


def by_prompt(*, target, **_):
    return [number / 6 for number in target]


def policy_weights(trainer):
    return torch.cat([
        p.detach().flatten() for n, p in trainer.model.named_parameters() if "critic" not in n
    ])  # fmt: skip


def test_with_a_silent_critic_and_no_kl_it_is_reinforce_with_the_reward_as_advantage(tmp_path):
    """Values 0, gamma = lambda = 1, nothing whitened: every token's advantage is the score."""
    silent = {"value_coef": 0.0, "kl_coef": 0.0, **MONTE_CARLO}
    ppo = ppo_trainer(tmp_path, own=silent)
    plain = rl_trainer(
        make_model(), arguments(tmp_path, per_device_train_batch_size=ANSWERS_PER_STEP),
        prompts=prompts(48), num_generations=1, advantage=lambda rewards: rewards,
    )  # fmt: skip
    for trainer in (ppo, plain):
        trainer.train()
    assert logged(ppo, "loss") == pytest.approx(logged(plain, "loss"), abs=1e-6)
    torch.testing.assert_close(policy_weights(ppo), weights(plain.model), atol=1e-6, rtol=0)
    assert (policy_weights(ppo) - weights(make_model())).abs().max() > 1e-3
    assert critic_of(ppo.model).weight.abs().max() == 0


def test_it_learns_to_write_even_numbers(tmp_path):
    """From about a half to above eight tenths in 12 rollouts of 48 completions."""
    trainer = ppo_trainer(
        tmp_path, max_steps=36, per_device_train_batch_size=48, adam_epsilon=1e-8,
        own={"epochs": 3, "kl_coef": 0.01},
    )  # fmt: skip
    trainer.train()
    rewards = logged(trainer, "reward")
    assert 0.2 < rewards[0] < 0.7
    assert rewards[-1] > rewards[0] + 0.25


@pytest.mark.parametrize("trunk", ["own", "shared"])
def test_the_critic_learns_what_completions_to_a_prompt_are_worth(trunk, base, tmp_path):
    """The score depends on the prompt alone, and the policy keeps still: values can be right."""
    trainer = ppo_trainer(
        tmp_path, max_steps=20, adam_epsilon=1e-8,
        own={
            "critic": own_critic(base) if trunk == "own" else None, "prompts": prompts(12),
            "rewards": {"target": (by_prompt, 1.0)}, "kl_coef": 0.0, "epochs": 2,
            "value_coef": 1.0, "loss": lambda logps, *_: logps * 0,
        },
    )  # fmt: skip
    trainer.train()
    assert abs(logged(trainer, "explained_variance")[0]) < 1e-6  # values of 0 explain nothing
    assert logged(trainer, "explained_variance")[-1] > 0.6
    assert logged(trainer, "value_loss")[-1] < 0.2 * logged(trainer, "value_loss")[0]


def test_the_ratio_is_1_in_the_first_step_of_a_rollout_and_moves_in_the_others(tmp_path):
    ratios = []

    def spy(logps, old_logps, advantages, mask):
        ratios.append(((logps - old_logps) * mask).exp().sub(1).abs().max().item())
        return clipped_policy_loss(logps, old_logps, advantages, mask)

    trainer = ppo_trainer(tmp_path, max_steps=6, own={"loss": spy, "epochs": 3})
    trainer.train()
    assert max(ratios[0], ratios[3]) < 1e-5
    assert min(ratios[i] for i in (1, 2, 4, 5)) > 1e-2
    assert logged(trainer, "clip_share")[0] == 0 < logged(trainer, "clip_share")[2]


def test_a_rollout_serves_its_minibatches_epochs_times(tmp_path):
    trainer = ppo_trainer(tmp_path, max_steps=8, own={"epochs": 2, "minibatches": 2})
    rollouts, trained, original = remember_rollouts(trainer), [], trainer.microbatch_loss
    trainer.microbatch_loss = lambda model, groups: (
        trained.append([group.completions for group in groups]), original(model, groups)
    )[1]  # fmt: skip
    trainer.train()
    assert [len(groups) for groups in rollouts] == [2 * ANSWERS_PER_STEP] * 2
    first, second = trained[:4], trained[4:]
    for steps, groups in ((first, rollouts[0]), (second, rollouts[1])):
        assert steps[:2] == steps[2:]
        assert steps[0] + steps[1] == [group.completions for group in groups]


def test_a_tokens_return_is_the_score_less_the_kl_from_there_on(tmp_path):
    """With values 0 and gamma = lambda = 1: score - kl_coef * sum of log-ratios; advantages too."""
    trainer = ppo_trainer(tmp_path, max_steps=2, own={"kl_coef": 0.3, **MONTE_CARLO})
    rollouts = remember_rollouts(trainer)
    trainer.train()
    reference = make_model()
    for group in rollouts[1]:  # of a policy that has taken a step away from the reference
        prompt_ids, (completion,) = group.prompt["prompt_ids"], group.completions
        (log_ratios,), (returns,) = group.columns["kl"], group.columns["returns"]
        ids = completion.token_ids
        logits = reference(torch.tensor([prompt_ids + ids])).logits[0]
        ref = logits.log_softmax(-1)[len(prompt_ids) - 1 : -1].gather(
            -1, torch.tensor(ids)[:, None]
        )
        expected = torch.tensor(completion.logps) - ref[:, 0]
        torch.testing.assert_close(log_ratios, expected, atol=1e-4, rtol=0)
        later = log_ratios.flip(0).cumsum(0).flip(0)
        torch.testing.assert_close(returns, group.rewards - 0.3 * later, atol=1e-5, rtol=0)
    kl = [group.columns["kl"][0] for group in rollouts[1]]
    assert max(row.abs().max() for row in kl) > 1e-2
    summed = torch.stack([row.sum() for row in kl]).mean().item()
    assert logged(trainer, "kl_per_completion")[1] == pytest.approx(summed, rel=1e-5)


def test_advantages_are_whitened_over_all_tokens_of_the_rollout(tmp_path):
    trainer = ppo_trainer(tmp_path, max_steps=2, own={"minibatches": 2})
    rollouts = remember_rollouts(trainer)
    trainer.train()
    flat, returns = (
        torch.cat([row for group in rollouts[0] for row in group.columns[name]])
        for name in ("advantages", "returns")
    )
    assert flat.mean().item() == pytest.approx(0, abs=1e-5)
    assert flat.std().item() == pytest.approx(1, abs=1e-4)
    # Returns are not: they are what values will be compared with.
    assert returns.mean() > 0.2


def test_the_kl_penalty_holds_the_policy_near_its_reference(tmp_path):
    ends = []
    for kl_coef in (1e-6, 1.0):
        trainer = ppo_trainer(
            tmp_path, max_steps=24, per_device_train_batch_size=48, adam_epsilon=1e-8,
            own={"kl_coef": kl_coef, "epochs": 2},
        )  # fmt: skip
        trainer.train()
        kl = logged(trainer, "kl_per_completion")
        assert kl[0] == pytest.approx(0, abs=1e-5)
        ends.append(sum(kl[-3:]) / 3)
    assert ends[1] < 0.6 * ends[0]


def test_the_kl_coefficient_follows_its_controller(tmp_path):
    """At first KL 0, below the target: the error is cut to -0.2, times 12 completions of 120."""
    control = partial(adaptive_kl_coef, target=5.0, horizon=120)
    trainer = ppo_trainer(tmp_path, own={"kl_coef": 0.5, "kl_control": control})
    trainer.train()
    coefs = logged(trainer, "kl_coef")
    assert coefs[0] == pytest.approx(0.5)
    assert coefs[1] == pytest.approx(0.5 * (1 - 0.2 * 0.1))


def test_without_kl_no_reference_is_held(tmp_path):
    trainer = ppo_trainer(tmp_path, max_steps=1, own={"kl_coef": 0.0})
    trainer.train()
    assert trainer.reference is None
    assert logged(trainer, "kl_per_completion") == []
    assert len(logged(trainer, "loss")) == 1
    with pytest.raises(ConfigError, match="one above 0 to start from, found 0"):
        ppo_trainer(tmp_path, own={"kl_coef": 0.0, "kl_control": adaptive_kl_coef})


def test_completions_that_could_not_be_scored_train_nothing(tmp_path):
    """Unscored: whatever the other half of the batch does, they move neither policy nor values."""

    def half_scored(completions, **_):
        return [s if i % 2 else None for i, s in enumerate(even_share(completions))]

    trainer = ppo_trainer(tmp_path, max_steps=1, own={"rewards": {"even": (half_scored, 1.0)}})
    rollouts = remember_rollouts(trainer)
    trainer.train()
    unscored = [group for group in rollouts[0] if math.isnan(group.rewards[0])]
    assert len(unscored) == ANSWERS_PER_STEP // 2
    assert not any(group.columns["advantages"][0].any() for group in unscored)
    assert logged(trainer, "unscored") == [0.5]
    start = ppo_trainer(tmp_path)
    loss = start.microbatch_loss(start.model, unscored)
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is None or not p.grad.any() for p in start.model.parameters())


@pytest.mark.parametrize("trunk", ["own", "shared"])
def test_how_a_batch_is_cut_changes_nothing(trunk, base, tmp_path):
    """One batch; three accumulated; micro-batches of 40 tokens; activations recomputed."""
    ends = []
    for cut in (
        {},
        {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 3},
        {"own": {"max_tokens_per_microbatch": 40}},
        {"activation_checkpointing": True},
    ):
        own = {
            "critic": own_critic(base) if trunk == "own" else None,
            "epochs": 2,
            "minibatches": 2,
        }
        own |= cut.pop("own", {})
        trainer = ppo_trainer(tmp_path, max_steps=4, own=own, **cut)
        trainer.train()
        ends.append(weights(trainer.model))
    for end in ends[1:]:
        torch.testing.assert_close(end, ends[0], atol=1e-5, rtol=0)


def test_the_critic_has_a_learning_rate_of_its_own(base, tmp_path):
    trainer = ppo_trainer(
        tmp_path, max_steps=1, own={"critic": own_critic(base), "value_learning_rate": 1e-5}
    )
    before = trainer.model.critic.model.norm.weight.clone(), trainer.model.model.norm.weight.clone()
    trainer.train()
    moved = (trainer.model.critic.score.weight.abs().max(),
             (trainer.model.model.norm.weight - before[1]).abs().max())  # fmt: skip
    assert 0 < moved[0] <= 1.01e-5
    assert moved[1] > 1e-3
    rates = {group["lr"] for group in trainer.optimizer.param_groups}
    assert rates == {1e-5, 1e-2}
    parameters = sum(len(group["params"]) for group in trainer.optimizer.param_groups)
    assert parameters == len(list(trainer.model.parameters()))


# Saving and resuming.


def run(base, folder, *, trunk="own", **settings):
    """`fit` as the recipe calls it: four steps, checkpoints after two."""
    config = Config(
        model_name_or_path=str(base), output_dir=str(folder), save_steps=2,
        per_device_train_batch_size=ANSWERS_PER_STEP, **settings,
    )  # fmt: skip
    model = load_model(config, quiet=True)
    critic = load_reward_model(config, make_tokenizer(), quiet=True) if trunk == "own" else None
    own = settings_of(
        critic=critic, epochs=2, kl_control=partial(adaptive_kl_coef, target=1.0, horizon=30)
    )
    trainer = tiny.ppo_trainer(model, training_arguments(config), **own)
    fit(trainer, config)
    return trainer


LORA = {"use_peft": True, "lora_r": 4}


@pytest.fixture(scope="module", params=["own", "shared", "own with LoRA", "shared with LoRA"])
def whole(request, base, tmp_path_factory):
    """(folder, trainer, settings) of a run without a stop."""
    trunk, _, peft = request.param.partition(" with ")
    settings = {"trunk": trunk, **(LORA if peft else {})}
    folder = tmp_path_factory.mktemp("whole") / "run"
    return folder, run(base, folder, **settings), settings


def stopped_at_2(source, target):
    shutil.copytree(source, target)
    shutil.rmtree(target / "model")
    (target / "checkpoints" / "checkpoint-4" / "manifest.json").unlink()
    return target


def test_a_resumed_run_ends_with_the_same_policy_critic_and_kl_coefficient(whole, base, tmp_path):
    folder, expected, settings = whole
    resumed = run(base, stopped_at_2(folder, tmp_path / "run"), resume=True, **settings)
    assert resumed.state.global_step == 4
    torch.testing.assert_close(weights(resumed.model), weights(expected.model), atol=1e-6, rtol=0)
    assert logged(resumed, "kl_coef") == pytest.approx(logged(expected, "kl_coef"))
    assert resumed.objective.kl_coef == pytest.approx(expected.objective.kl_coef)
    assert logged(expected, "kl_coef")[1] != logged(expected, "kl_coef")[0]
    assert (
        critic_of(expected.model).state_dict().keys()
        == critic_of(resumed.model).state_dict().keys()
    )


def test_the_saved_model_is_the_policy_alone(whole):
    folder, trainer, settings = whole
    names = {path.name for path in (folder / "model").iterdir()}
    assert CRITIC_FILE not in names
    assert ("adapter_config.json" in names) == ("use_peft" in settings)
    model, loading = AutoModelForCausalLM.from_pretrained(
        folder / "model", output_loading_info=True
    )
    assert not loading["unexpected_keys"]
    assert not loading["missing_keys"]
    ids = torch.tensor([[5, 6, 7, 8]])
    torch.testing.assert_close(
        model(ids).logits, trainer.model.eval()(ids).logits, atol=1e-4, rtol=1e-4
    )
    start = make_model()(ids).logits
    assert (model(ids).logits - start).abs().max() > 1e-2


def test_a_checkpoint_of_another_critic_is_refused(base, tmp_path):
    run(base, tmp_path / "run", trunk="shared")
    with pytest.raises(DataError, match="holds another critic"):
        run(base, stopped_at_2(tmp_path / "run", tmp_path / "again"), trunk="own", resume=True)


def test_the_adapter_switched_off_is_the_reference(base, tmp_path):
    """The KL against it is that against a frozen copy of the model."""
    curves = []
    for frozen_copy in (False, True):
        config = Config(model_name_or_path=str(base), output_dir=str(tmp_path), **LORA)
        trainer = ppo_trainer(tmp_path, model=load_model(config, quiet=True), own={"epochs": 1})
        assert trainer.reference is None
        if frozen_copy:
            plain = Config(model_name_or_path=str(base))
            trainer.reference = load_model(plain, quiet=True)
        trainer.train()
        curves.append(logged(trainer, "kl_per_completion"))
    assert abs(curves[0][2]) > 1e-3
    assert curves[0] == pytest.approx(curves[1], rel=1e-3, abs=1e-5)


@pytest.mark.parametrize(
    ("own", "changes", "said"),
    [
        ({"epochs": 2, "minibatches": 2}, {}, r"--max_steps 3: .* \(2 x 2\)"),
        ({"epochs": 0}, {}, "--epochs: expected at least 1, found 0"),
        ({"epochs": 3}, {"save_strategy": "steps", "save_steps": 2}, "--save_steps 2"),
    ],
)
def test_steps_that_do_not_use_up_a_rollout_are_refused(own, changes, said, tmp_path):
    with pytest.raises(ConfigError, match=said):
        ppo_trainer(tmp_path, own=own, **changes)


@pytest.mark.parametrize(
    ("own", "said"),
    [
        ({"reward_kl_coef": 0.1}, "reward_kl_coef: it acts on the advantages of groups"),
        ({"selection": Selection(max_refills=1)}, "max_refills: it acts on the advantages"),
        ({"overlap": True}, "with overlap, completions come from another distribution"),
        ({"engine": print}, "where an engine generates, completions come from another"),
    ],
)
def test_rollouts_that_an_actor_critic_could_not_use_are_refused(own, said, tmp_path):
    with pytest.raises(ConfigError, match=said):
        ppo_trainer(tmp_path, own=own)
