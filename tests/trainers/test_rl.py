"""RLTrainer: it learns from rewards, on the ids that were sampled, at the probabilities it says."""

from functools import partial

import pytest
import torch

from posttrain.errors import ConfigError
from posttrain.losses import clipped_policy_loss, dual_clip_policy_loss
from posttrain.rewards.call import Scoring
from posttrain.rollouts.options import NothingToLearnError
from posttrain.rollouts.sampling import Sampling
from posttrain.run.folder import read_log
from tests.conftest import EOS, make_model
from tests.trainers import tiny
from tests.trainers.tiny import (
    MAX_COMPLETION,
    NUM_GENERATIONS,
    PROMPTS_PER_STEP,
    even_share,
    logged,
    make_trainer,
    prompts,
    remember_rollouts,
    weights,
)

ANSWERS = PROMPTS_PER_STEP * NUM_GENERATIONS


def rl_trainer(folder, **settings):
    return make_trainer("rl", folder, **settings)


def sampled_ids(rollouts):
    return [c.token_ids for rollout in rollouts for c in rollout.flat]


def test_it_learns_to_write_even_numbers(tmp_path):
    """From about a half to above nine tenths in 20 steps of 64 completions."""
    trainer = rl_trainer(
        tmp_path, max_steps=20, per_device_train_batch_size=64, adam_epsilon=1e-8,
        trainer={"prompts": prompts(16), "num_generations": 8},
    )  # fmt: skip
    trainer.train()
    rewards = logged(trainer, "reward")
    assert 0.2 < rewards[0] < 0.7
    assert sum(rewards[-3:]) / 3 > rewards[0] + 0.3


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_trained_ids_are_the_sampled_ids_at_the_sampled_probabilities(temperature, tmp_path):
    """The decode loop's log-probs equal the training forward's; the ids are never made anew."""
    sampling = Sampling(MAX_COMPLETION, (EOS, 2, 3), temperature)
    trained, gaps = [], []

    def spy(logps, old_logps, advantages, mask):
        gaps.append(((logps - old_logps) * mask).abs().max().item())
        return clipped_policy_loss(logps, old_logps, advantages, mask)

    settings = {"sampling": sampling, "loss": spy}
    trainer = rl_trainer(tmp_path, max_steps=1, trainer=settings)
    rollouts = remember_rollouts(trainer)
    original = trainer.microbatch_loss

    def remember(model, groups):
        trained.extend(c.token_ids for group in groups for c in group.completions)
        return original(model, groups)

    trainer.microbatch_loss = remember
    trainer.train()
    assert sorted(trained) == sorted(sampled_ids(rollouts))
    assert len(trained) == ANSWERS
    assert gaps == [0.0]  # the first update is on-policy by construction
    assert logged(trainer, "sampler_gap")[0] < 1e-4


def test_the_first_loss_is_minus_the_token_mean_of_the_advantages(tmp_path):
    """Ratio 1: each token costs -A, and every token of the batch counts alike."""
    trainer = rl_trainer(tmp_path, max_steps=1)
    rollouts = remember_rollouts(trainer)
    trainer.train()
    (rollout,) = rollouts
    advantages = trainer.rollouts.advantage(rollout.rewards).flatten().tolist()
    lengths = [len(completion.token_ids) for completion in rollout.flat]
    expected = -sum(a * n for a, n in zip(advantages, lengths, strict=True)) / sum(lengths)
    assert len(set(lengths)) > 2
    assert logged(trainer, "loss") == pytest.approx([expected], abs=1e-6)


@pytest.mark.parametrize("per", ["sequence", "constant"])
def test_other_means_over_tokens_are_as_their_names_say(per, tmp_path):
    """Per sequence: the mean advantage, which is 0. Constant: A n / max_tokens, averaged."""
    trainer = rl_trainer(
        tmp_path, max_steps=1, trainer={"per": per, "max_tokens_per_microbatch": 64}
    )
    rollouts = remember_rollouts(trainer)
    trainer.train()
    advantages = trainer.rollouts.advantage(rollouts[0].rewards).flatten().tolist()
    lengths = [len(completion.token_ids) for completion in rollouts[0].flat]
    terms = [
        a * (1 if per == "sequence" else n / MAX_COMPLETION)
        for a, n in zip(advantages, lengths, strict=True)
    ]
    assert logged(trainer, "loss") == pytest.approx([-sum(terms) / len(terms)], abs=1e-5)


def test_two_updates_share_one_rollout_whose_old_log_probs_are_recomputed(tmp_path):
    ratios = []

    def spy(logps, old_logps, advantages, mask):
        ratios.append(((logps - old_logps) * mask).abs().max().item())
        return clipped_policy_loss(logps, old_logps, advantages, mask)

    settings = {"updates_per_rollout": 2, "loss": spy}
    trainer = rl_trainer(tmp_path, max_steps=4, learning_rate=3e-2, trainer=settings)
    rollouts = remember_rollouts(trainer)
    trainer.train()
    assert [len(rollout.prompts) for rollout in rollouts] == [2 * PROMPTS_PER_STEP] * 2
    assert ratios[0] < 1e-5 > ratios[2]
    assert ratios[1] > 1e-2 < ratios[3]
    shares = logged(trainer, "clip_share")
    assert shares[0] == shares[2] == 0
    assert shares[1] > 0


def test_one_rollout_a_step_and_none_in_vain(tmp_path):
    trainer = rl_trainer(tmp_path)
    rollouts = remember_rollouts(trainer)
    trainer.train()
    assert len(rollouts) == trainer.state.global_step == 3


def test_kl_to_the_reference_starts_at_0_and_holds_the_policy_back(tmp_path):
    free, held = (
        rl_trainer(
            tmp_path,
            max_steps=8,
            learning_rate=3e-3,
            adam_epsilon=1e-8,
            model=make_model(num_hidden_layers=2),
            trainer={"beta": beta},
        )
        for beta in (1e-9, 10.0)
    )
    for trainer in (free, held):
        trainer.train()
    assert logged(free, "kl")[0] == pytest.approx(0, abs=1e-7)
    assert logged(free, "kl")[1] > 1e-3
    assert logged(held, "kl")[-1] < 0.5 * logged(free, "kl")[-1]
    assert torch.equal(weights(free.reference), weights(make_model(num_hidden_layers=2)))


def test_in_half_precision_the_reference_computes_as_the_policy_does(tmp_path):
    """Else the first KL would be the gap between two number formats, about 1e-4 here."""
    trainer = rl_trainer(tmp_path, max_steps=2, bf16=True, trainer={"beta": 0.1})
    trainer.train()
    kl = logged(trainer, "kl")
    assert kl[0] == pytest.approx(0, abs=1e-7)
    assert kl[1] > 1e-3


def test_without_beta_no_reference_is_held_and_no_kl_logged(tmp_path):
    trainer = rl_trainer(tmp_path, max_steps=1)
    trainer.train()
    assert trainer.reference is None
    assert logged(trainer, "kl") == []


def test_groups_larger_than_a_microbatch_are_cut_with_unchanged_gradients(tmp_path):
    whole, cut = (
        rl_trainer(tmp_path, trainer={"max_tokens_per_microbatch": tokens, "beta": 0.1})
        for tokens in (16384, 24)
    )
    packed, original = [], cut.microbatch_loss

    def spy(model, groups):
        packed.append(sum(map(cut.num_tokens, groups)))
        return original(model, groups)

    cut.microbatch_loss = spy
    whole.train()
    cut.train()
    assert max(packed) <= 25  # the longest prompt and one completion
    assert len(packed) > 3 * PROMPTS_PER_STEP
    assert (weights(whole.model) - weights(cut.model)).abs().max() < 1e-6


def test_the_same_seed_gives_the_same_rollouts_and_another_seed_others(tmp_path):
    sampled = []
    for seed in (5, 5, 6):
        trainer = rl_trainer(tmp_path, seed=seed, max_steps=2)
        rollouts = remember_rollouts(trainer)
        trainer.train()
        sampled.append(sampled_ids(rollouts))
    assert sampled[0] == sampled[1] != sampled[2]
    assert sampled[0][:ANSWERS] != sampled[0][ANSWERS:]


def failing(**_):
    raise RuntimeError("the judge is down")


def first_is_none(completions, **_):
    return [None if i % NUM_GENERATIONS == 0 else i % 3 for i in range(len(completions))]


def test_a_reward_that_always_raises_ends_the_run_with_its_cause(tmp_path):
    settings = {"rewards": {"judge": (failing, 1.0)}, "scoring": Scoring()}  # in workers
    trainer = rl_trainer(tmp_path, max_steps=2, trainer=settings)
    with pytest.raises(NothingToLearnError, match=r"64 of 64|16 of 16 completions .* is down"):
        trainer.train()
    assert trainer.metrics.reduce()["reward_failures"] == PROMPTS_PER_STEP  # a call for each group
    assert torch.equal(weights(trainer.model), weights(make_model()))


def test_completions_without_a_reward_are_left_out_and_the_others_train(tmp_path):
    seen = []

    def spy(logps, old_logps, advantages, mask):
        seen.append(advantages.view(-1, NUM_GENERATIONS))
        return clipped_policy_loss(logps, old_logps, advantages, mask)

    settings = {"rewards": {"r": (first_is_none, 1.0)}, "loss": spy}
    trainer = rl_trainer(tmp_path, max_steps=1, trainer=settings)
    trainer.train()
    assert logged(trainer, "unscored") == [1 / NUM_GENERATIONS]
    assert (seen[0][:, 0] == 0).all()
    assert (seen[0][:, 1:].abs().amax(1) > 0.5).all()
    assert logged(trainer, "loss")[0] == logged(trainer, "loss")[0]  # no NaN


def test_samples_and_metrics_of_a_rollout_are_written_down(tmp_path):
    path = tmp_path / "samples.jsonl"
    trainer = rl_trainer(tmp_path, trainer={"samples_path": path}, logging_steps=2, max_steps=4)
    trainer.train()
    samples = read_log(path)
    first = [sample["step"] for sample in samples if sample["chosen"] == "first"]
    assert first == [1, 1, 2, 2, 4, 4]
    assert {sample["step"] for sample in samples if sample["chosen"] != "first"} <= {1, 2, 4}
    texts = set(prompts()["prompt"])
    for sample in samples:
        assert sample["prompt"] in texts
        assert sample["reward"] == sample["even"] == even_share([sample["completion"]])[0]
        assert sample["finish_reason"] in ("stop", "length")
    for name in ("reward", "even", "mean_completion_tokens", "truncated", "reward_std_zero",
                 "entropy", "clip_share", "grad_norm", "tokens_per_second", "seconds_generate",
                 "seconds_reward", "sampler_gap"):  # fmt: skip
        assert len(logged(trainer, name)) == 2, name


def test_evaluation_is_greedy_and_counts_each_prompt_once(tmp_path):
    """7 prompts in batches of 3: the same completions every time, and one reward call each."""
    counts = []

    def counting(completions, **rest):
        counts.append(len(completions))
        return even_share(completions, **rest)

    held_out = prompts(7, seed=4)
    trainer = rl_trainer(
        tmp_path, per_device_eval_batch_size=3,
        trainer={"eval_prompts": held_out, "rewards": {"even": (counting, 1.0)}},
    )  # fmt: skip
    results = [trainer.evaluate() for _ in range(2)]
    assert counts == [3, 3, 1] * 2
    assert results[0] == results[1]
    model = make_model()
    rewards = []
    for row in held_out:
        prompt = torch.tensor([row["prompt_ids"]])
        ids = model.generate(
            prompt, do_sample=False, max_new_tokens=MAX_COMPLETION,
            eos_token_id=list(trainer.sampling.stop_ids),
        )[0, prompt.shape[1] :]  # fmt: skip
        rewards += even_share([" ".join(str(int(i)) for i in ids if i != EOS)])
    assert results[0]["eval_reward"] == pytest.approx(sum(rewards) / 7)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"per_device_train_batch_size": 10}, "expected a multiple of --num_generations"),
        ({"max_steps": -1}, "--max_steps: RL has no epochs"),
        (
            {
                "max_steps": 4,
                "save_strategy": "steps",
                "save_steps": 3,
                "trainer": {"updates_per_rollout": 2},
            },
            "--save_steps 3: expected a multiple of --updates_per_rollout",
        ),
        (
            {"max_steps": 3, "trainer": {"updates_per_rollout": 2}},
            "--max_steps 3: expected a multiple of --updates_per_rollout",
        ),
        (
            {"max_steps": 3, "trainer": {"sampling": Sampling(1000, (EOS,))}},
            "longest sequence has 1,0.* tokens.*Lower --max_prompt_length",
        ),
        (
            {
                "trainer": {
                    "rewards": {"r": (lambda completions, targte: [completions, targte], 1.0)}
                }
            },
            "'targte'.*Nearest: 'target'",
        ),
        (
            {"trainer": {"loss": lambda a, b, c, d, values: a + b + c + d + values}},
            r"expected f\(logps, old_logps, advantages, mask\).*'values'",
        ),
        (
            {"trainer": {"loss": lambda logps, advantages: logps * advantages}},
            "too many positional arguments",
        ),
        ({"trainer": {"per": "group"}}, "per: expected one of token, sequence, constant"),
        ({"trainer": {"sampling": Sampling(4, (EOS,), 0.0)}}, "temperature above 0"),
    ],
    ids=[
        "batch",
        "max_steps",
        "save_steps",
        "rollout",
        "context",
        "column",
        "loss",
        "short loss",
        "per",
        "greedy",
    ],
)
def test_settings_that_cannot_work_are_refused_before_step_0(settings, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        rl_trainer(tmp_path, **settings)


def test_too_few_prompts_for_a_rollout_are_refused_before_step_0(tmp_path):
    trainer = rl_trainer(tmp_path, trainer={"prompts": prompts(3)})
    with pytest.raises(ConfigError, match="takes 4 prompts, and the data has 3"):
        trainer.train()


def test_losses_with_bound_settings_are_accepted(tmp_path):
    loss = partial(dual_clip_policy_loss, clip_high=0.28)
    rl_trainer(tmp_path, max_steps=1, trainer={"loss": loss}).train()


def test_the_reference_is_left_out_of_what_is_trained_and_saved(tmp_path):
    trainer = rl_trainer(tmp_path, max_steps=1, trainer={"beta": 0.1})
    trainer.train()
    trained = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert trained == {id(p) for p in trainer.model.parameters()}


def test_by_default_a_group_is_not_cut_for_speed(tmp_path):
    """Its prompt would be computed again for each part."""
    trainer = tiny.rl_trainer(make_model("llama", hidden_size=256), tiny.arguments(tmp_path))
    assert trainer.max_tokens_per_microbatch == 2048
    assert trainer.max_tokens_per_group == 16384
