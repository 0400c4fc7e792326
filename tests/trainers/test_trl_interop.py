"""Rewards cross over: ours in TRL's GRPOTrainer, TRL's in our RLTrainer, without a change."""

from functools import partial

import pytest
import torch

from posttrain.rewards.call import with_messages
from posttrain.rewards.length import soft_overlong_reward
from posttrain.rewards.math import math_reward
from posttrain.rollouts.sampling import Sampling
from tests.conftest import EOS, make_model, make_tokenizer
from tests.trainers.tiny import logged, make_trainer

ANSWER_TOKENS = 6


def test_our_rewards_train_in_trls_grpo_trainer(tmp_path):
    """Greedy completions, so that the golds can be made right, wrong or unreadable beforehand."""
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    seen = []

    def correct(completions, *, answer, **columns):
        values = math_reward(completions, answer=answer, allow_last_number=True, **columns)
        seen.extend(zip(answer, values, strict=True))
        return values

    model, prompts = (
        make_model(),
        [[n, n + 1, n + 2] for n in (22, 32, 42, 52)],
    )  # no 0 or 1: special tokens
    greedy = [
        model.generate(
            torch.tensor([ids]), max_new_tokens=ANSWER_TOKENS, do_sample=False, eos_token_id=[EOS]
        )[0, 3:].tolist()
        for ids in prompts
    ]
    right = [str([token for token in answer if token != EOS][-1]) for answer in greedy]
    golds = [right[0], right[1] + "0", "", right[3] + ".0"]  # right, wrong, unreadable, right
    rows = [
        {"prompt": " ".join(map(str, ids)), "answer": gold}
        for ids, gold in zip(prompts, golds, strict=True)
    ]
    trainer = trl.GRPOTrainer(
        model,
        [correct, partial(soft_overlong_reward, max_tokens=100, cache_tokens=100)],
        args=trl.GRPOConfig(
            output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=16,
            num_generations=4, max_completion_length=ANSWER_TOKENS, temperature=1e-3,
            logging_steps=1, use_cpu=True, bf16=False, report_to="none", disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=make_tokenizer(),
    )  # fmt: skip
    trainer.train()
    assert sorted(set(seen), key=str) == sorted(
        zip(golds, [1.0, 0.0, None, 1.0], strict=True), key=str
    )
    (log,) = [entry for entry in trainer.state.log_history if "reward" in entry]
    assert log["rewards/correct/mean"] == pytest.approx(2 / 3)  # TRL leaves None out
    mean_length = sum(map(len, greedy)) / 4
    assert log["rewards/soft_overlong_reward/mean"] == pytest.approx(-mean_length / 100)


def test_a_reward_written_for_trl_trains_in_ours(tmp_path):
    """TRL's overlong punishment reads token ids, its format reward reads messages."""
    rewards = pytest.importorskip("trl.rewards")
    overlong = rewards.get_soft_overlong_punishment(
        max_completion_len=ANSWER_TOKENS, soft_punish_cache=ANSWER_TOKENS
    )
    trainer = make_trainer(
        "rl", tmp_path,
        trainer={
            "rewards": {
                "short": (overlong, 1.0),
                "format": (with_messages(rewards.think_format_reward), 0.1),
            },
            "sampling": Sampling(ANSWER_TOKENS, (EOS, *range(2, 30)), 1.0),
        },
    )  # fmt: skip
    trainer.train()
    lengths, shorts = logged(trainer, "mean_completion_tokens"), logged(trainer, "short")
    assert len(shorts) == 3
    for length, short in zip(lengths, shorts, strict=True):
        assert short == pytest.approx(-length / ANSWER_TOKENS)
    assert logged(trainer, "format") == [0.0] * 3
    assert logged(trainer, "reward_failures") == [0.0] * 3
