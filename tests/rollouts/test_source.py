"""Which prompts a rollout takes, what rewards see of it, and what training gets."""

import threading

import pytest
import torch

from posttrain.errors import ConfigError
from posttrain.rollouts.group import roll_out
from posttrain.rollouts.options import SEED_STRIDE, PromptOrder, RolloutPlan
from posttrain.rollouts.sampling import Completion, Sampling
from posttrain.rollouts.source import Rollouts
from tests.conftest import make_tokenizer
from tests.rollouts.sources import bind, take
from tests.trainers.tiny import prompts

SAMPLING = Sampling(max_tokens=4, stop_ids=(1,))


def plan(**changes):
    settings = {
        "prompts_per_batch": 2,
        "batches_per_rollout": 2,
        "seed": 3,
    }
    return RolloutPlan(**{**settings, **changes})


class CountingGenerator:
    """Answer j to a prompt of n tokens is [n, j + 2, 1]."""

    def generate(self, prompts, sampling, num_generations, *, seeds):
        assert sampling is SAMPLING
        assert len(seeds) == len(prompts)
        return [
            [
                Completion(
                    [len(prompt), j + 2, 1], [-1.0, -2.0, -3.0 - j], [0.0] * 3, finish_reason="stop"
                )
                for j in range(num_generations)
            ]
            for prompt in prompts
        ]


def roll(data, rewards, seeds=None):
    return roll_out(
        CountingGenerator(), make_tokenizer(), data, rewards=rewards, sampling=SAMPLING,
        num_generations=2, seeds=seeds or range(len(data)),
    )  # fmt: skip


def source(data, rewards, *, advantage=lambda rewards: rewards, **changes):
    """Rollouts whose completions come from CountingGenerator."""
    made = Rollouts(data, rewards, SAMPLING, num_generations=2, advantage=advantage)
    made.roll_out = lambda prompts, seeds, **_: roll(prompts, rewards, seeds)
    return bind(made, **{"seed": 3, **changes})


def second_word(completions, **_):
    return [float(text.split()[1]) for text in completions]


def test_ranks_and_accumulation_steps_cut_the_same_optimizer_batch():
    """Rollout 1 of 8 prompts: one rank x 4 batches, two ranks x 2, four ranks x 1."""
    one = plan(batches_per_rollout=4).positions(1)
    assert one == list(range(8, 16))
    for world in (2, 4):
        plans = [
            plan(batches_per_rollout=4 // world, world_size=world, rank=rank)
            for rank in range(world)
        ]
        assert {p.prompts_per_rollout for p in plans} == {8}
        everyone = [p.positions(1) for p in plans]
        assert sorted(x for positions in everyone for x in positions) == one
        # The k-th batches of all ranks are neighbours.
        assert sorted(x for positions in everyone for x in positions[:2]) == one[: 2 * world]


def test_each_pass_takes_every_prompt_once_in_an_order_of_its_own():
    order = PromptOrder(10, seed=0)
    first, second = ([order[10 * p + i] for i in range(10)] for p in (0, 1))
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second
    assert [order[i] for i in range(10)] == first  # going back gives the same
    assert [PromptOrder(10, seed=1)[i] for i in range(10)] != first


def test_rewards_are_called_once_with_all_completions_in_trls_convention():
    calls = []

    def reward(completions, *, prompts, completion_ids, target, **rest):
        calls.append((completions, prompts, completion_ids, target, rest))
        return [1.0] * len(completions)

    data = prompts(3).to_list()
    rollout = roll(data, {"r": (reward, 1.0)})
    (completions, texts, ids, target, rest) = calls[0]
    assert len(calls) == 1
    assert rest == {
        "trainer_state": None,
        "prompt_ids": [ids for row in data for ids in [row["prompt_ids"]] * 2],
    }
    assert target == [row["target"] for row in data for _ in range(2)]
    assert texts == [row["prompt"] for row in data for _ in range(2)]
    assert ids == [[len(row["prompt_ids"]), j + 2, 1] for row in data for j in range(2)]
    # Decoded without the end-of-sequence token, which stays in the ids.
    assert completions == [f"{len(row['prompt_ids'])} {j + 2}" for row in data for j in range(2)]
    assert rollout.rewards.tolist() == [[1.0, 1.0]] * 3


def test_groups_carry_the_sampled_ids_with_their_log_probs_and_advantages():
    data = prompts(4)
    first, second = take(source(data, {"second": (second_word, 1.0)}), 2)
    order = PromptOrder(4, seed=3)
    for position, group in enumerate([*first, *second]):
        ids = data[order[position]]["prompt_ids"]
        assert group.prompt["prompt_ids"] == ids
        assert [c.token_ids for c in group.completions] == [[len(ids), 2, 1], [len(ids), 3, 1]]
        logps = [row.tolist() for row in group.columns["policy_logps"]]
        assert logps == [[-1.0, -2.0, -3.0], [-1.0, -2.0, -4.0]]
        assert group.advantages.tolist() == group.rewards.tolist() == [2.0, 3.0]


def test_a_completion_that_cannot_be_scored_is_nan_in_the_matrix_and_counted():
    def reward(completions, **_):
        return [None, 1.0] * (len(completions) // 2)

    rollout = roll(prompts(2).to_list(), {"some": (reward, 1.0), "second": (second_word, 0.5)})
    assert rollout.rewards[:, 0].isnan().all()
    assert rollout.rewards[:, 1].tolist() == [2.5, 2.5]  # 1 + 3 / 2
    assert rollout.scores.none == 2


def facts(batches):
    return [[(g.prompt["prompt"], g.advantages.tolist()) for g in batch] for batch in batches]


def test_a_resumed_source_continues_where_the_first_would_have():
    data, rewards = prompts(7), {"second": (second_word, 1.0)}
    whole = take(source(data, rewards, accumulation=1), 5)
    resumed = take(source(data, rewards, accumulation=1), 2, first_rollout=3)
    assert facts(resumed) == facts(whole)[3:]
    assert facts(whole)[3] != facts(whole)[0]


def test_seeds_follow_the_position_and_the_run_seed():
    seen = []

    def remember(prompts, seeds, **_):
        seen.append(seeds)
        return roll(prompts, {"second": (second_word, 1.0)}, seeds)

    for rank, seed in ((0, 3), (1, 3), (0, 4)):
        one = source(prompts(8), {"s": (second_word, 1.0)}, rank=rank, world_size=2, seed=seed)
        one.roll_out = remember
        take(one, 4)
    assert seen[0] == [3 * SEED_STRIDE + position for position in (0, 1, 4, 5)]
    everyone = [seed for seeds in seen for seed in seeds]
    assert len(seen) == 6
    assert len(set(everyone)) == len(everyone) == 24


def test_more_prompts_a_rollout_than_there_are_is_refused():
    with pytest.raises(ConfigError, match="takes 4 prompts, and the data has 3"):
        source(prompts(3), {"s": (second_word, 1.0)})


def test_advantages_are_a_function_of_the_whole_reward_matrix():
    shapes = []

    def centred(rewards):
        shapes.append(tuple(rewards.shape))
        return rewards - rewards.mean()

    first, second = take(source(prompts(4), {"s": (second_word, 1.0)}, advantage=centred), 1)[0]
    assert shapes == [(1, 2), (4, 2)]  # once to see whether it takes groups of two
    assert first.advantages.tolist() == second.advantages.tolist() == [-0.5, 0.5]


def test_a_group_that_is_cut_keeps_each_completions_columns():
    """A prompt of 2 tokens and completions of 3: at most 6 tokens hold one of them."""
    group = take(source(prompts(4), {"s": (second_word, 1.0)}), 1)[0][0]
    room = len(group.prompt["prompt_ids"]) + 4
    parts = group.cut(room)
    assert [len(part.completions) for part in parts] == [1, 1]
    assert [part.num_tokens for part in parts] == [room - 1] * 2
    assert [part.advantages.tolist() for part in parts] == [[2.0], [3.0]]
    parts[1].columns["extra"] = parts[0].columns["extra"] = [torch.ones(3)]
    parts[1].columns["extra"] = [torch.zeros(3)]
    group.add_columns_of(parts)
    assert [row.tolist() for row in group.columns["extra"]] == [[1.0] * 3, [0.0] * 3]
    assert group.cut(room + 3) == [group]


class TwoAtOnce(CountingGenerator):
    """Draws two completions at once, and before the second prompt waits for `scored`."""

    rows_at_once = 2

    def __init__(self, scored):
        self.scored, self.calls, self.waited = scored, 0, []

    def generate(self, prompts, sampling, num_generations, *, seeds):
        if self.calls:
            self.waited.append(self.scored.wait(20))
        self.calls += 1
        return super().generate(prompts, sampling, num_generations, seeds=seeds)


def test_completions_are_scored_while_the_next_ones_are_sampled():
    scored, data = threading.Event(), prompts(3)
    generator = TwoAtOnce(scored)

    def reward(target, **_):
        scored.set()
        return [float(t) for t in target]

    rollout = roll_out(
        generator, make_tokenizer(), [data[i] for i in range(3)], rewards={"r": (reward, 1.0)},
        sampling=SAMPLING, num_generations=2, seeds=range(3),
    )  # fmt: skip
    assert generator.waited == [True, True]
    assert rollout.rewards.tolist() == [[float(t)] * 2 for t in data["target"]]
    assert len(rollout.texts) == 6
