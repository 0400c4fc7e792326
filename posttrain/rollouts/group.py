"""Hold completions with their rewards: `Rollout` as sampled and scored, `Group` as trained on.

    rollout = roll_out(generator, tokenizer, prompts, rewards=rewards, sampling=sampling, …)
    groups = rollout.groups()                    # one for each prompt
    batch = pack(groups, device="cpu")           # posttrain.packed: the prompt once for all of them

A group is all that travels from the rollouts to the objective: the completions, their rewards and
advantages, and columns with one number for each token of each completion.

    assign_advantages(groups, group_advantages)            -> Group.advantages, (G,)
    assign_advantages(groups, reinforce_pp_advantages)     -> Group.columns["advantages"]

The names of its arguments say what an advantage is a function of, with P the prompts of all ranks:

    f(rewards)                 (P, G) -> (P, G)                        GRPO, RLOO, …
    f(rewards, mask)           (P, G), (P*G, T) -> (P*G, T)            REINFORCE++-baseline
    f(token_rewards, mask)     (P*G, T), (P*G, T) -> (P*G, T)          REINFORCE++
    f(groups)                  this rank's groups -> for each (G, T)   process supervision

`rewards` has NaN where a completion could not be scored; `token_rewards` has a completion's reward
at its last token, and 0 with a mask of 0 throughout where it has none.
"""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from posttrain.advantages import rlhf_token_rewards
from posttrain.errors import ConfigError
from posttrain.packed.batch import PackedBatch, pack_groups, with_experts
from posttrain.rewards.call import Scores, Scoring, start_scoring
from posttrain.rewards.pieces import take_verdicts
from posttrain.rollouts.sampling import Completion, Generator, Sampling
from posttrain.run.engine import from_all_ranks, rank_and_world

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, TrainerState

Prompt = dict[str, Any]  # a row of load_prompts: prompt, prompt_ids, and the data's other columns
Rewards = Mapping[str, tuple[Callable[..., Any], float]]  # name -> (function, weight)


@dataclass
class Group:
    """One prompt and its G completions, with everything that training needs of them.

    Attributes:
        rewards: (G,) total rewards, NaN where a completion could not be scored.
        has_signal: False where all completions have the same reward (standard deviation zero).
        advantages: (G,) one for each completion; None where `columns` has one for each token.
        columns: For each name G tensors on the CPU, with one number for each token: always
            `policy_logps` and `sampler_logps` (posttrain.rollouts.sampling.Completion), and as the
            rollouts and the objective need them `old_logps` (NaN where the ratio starts at 1),
            `ref_logps`, `advantages`, `trained` (1 where a token trains; all do by default),
            `fresh` (1 where the newest policy sampled it), or columns of an objective's own.
    """

    prompt: Prompt
    completions: list[Completion]
    rewards: Tensor
    has_signal: bool = True
    advantages: Tensor | None = None
    columns: dict[str, list[Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.columns:
            self.columns = {
                "policy_logps": [torch.tensor(c.logps) for c in self.completions],
                "sampler_logps": [torch.tensor(c.sampler_logps) for c in self.completions],
            }

    @property
    def num_tokens(self) -> int:
        """Packed tokens: the prompt's once, and those of all completions."""
        return len(self.prompt["prompt_ids"]) + sum(len(c.token_ids) for c in self.completions)

    def trained_tokens(self) -> list[int]:
        """The number of tokens that train in each completion."""
        if "trained" in self.columns:
            return [int(mask.sum()) for mask in self.columns["trained"]]
        return [len(completion.token_ids) for completion in self.completions]

    def whole(self) -> list[int]:
        """Indices of the completions that ended by themselves, not at the longest length."""
        return [i for i, c in enumerate(self.completions) if c.finish_reason == "stop"]

    def select(self, indices: Sequence[int]) -> Group:
        """The same group with these of its completions."""
        return replace(
            self,
            completions=[self.completions[i] for i in indices],
            rewards=self.rewards[list(indices)],
            advantages=None if self.advantages is None else self.advantages[list(indices)],
            columns={name: [rows[i] for i in indices] for name, rows in self.columns.items()},
        )

    def without_advantage(self) -> Group:
        """Return the group with advantages of 0: it can be run, and teaches nothing."""
        columns = dict(self.columns)
        if "advantages" in columns:
            columns["advantages"] = [torch.zeros_like(row) for row in columns["advantages"]]
        advantages = None if self.advantages is None else torch.zeros_like(self.advantages)
        return replace(self, advantages=advantages, columns=columns)

    def cut(self, max_tokens: int) -> list[Group]:
        """Split into groups with the same prompt, each of at most `max_tokens` packed tokens; only
        a single completion may exceed that."""
        room = max_tokens - len(self.prompt["prompt_ids"])
        parts: list[list[int]] = [[]]
        load = 0
        for index, completion in enumerate(self.completions):
            length = len(completion.token_ids)
            if parts[-1] and load + length > room:
                parts.append([])
                load = 0
            parts[-1].append(index)
            load += length
        return [self] if len(parts) == 1 else [self.select(part) for part in parts]

    def add_columns_of(self, parts: Sequence[Group]) -> None:
        """Take over the columns of the groups that `cut` made of this one, in their order."""
        for name in parts[0].columns:
            self.columns[name] = [row for part in parts for row in part.columns[name]]


def pack(groups: Sequence[Group], *, device: torch.device | str) -> PackedBatch:
    """Pack groups into one micro-batch; rows of the dense view are the completions in order.

    Rows have the columns `rewards` and `advantages`; where tokens have advantages of their own,
    these are a column of tokens (`advantages_of` finds either). Choices of experts come along.
    """
    names = groups[0].columns
    by_row = {"rewards": [r for group in groups for r in group.rewards.tolist()]}
    if groups[0].advantages is not None:
        by_row["advantages"] = [a for group in groups for a in group.advantages.tolist()]
    batch = pack_groups(
        [group.prompt["prompt_ids"] for group in groups],
        [[completion.token_ids for completion in group.completions] for group in groups],
        device=device,
        token_columns={name: [x for g in groups for x in g.columns[name]] for name in names},
        row_columns=by_row,
        images=[group.prompt.get("images") for group in groups],
    )
    if groups[0].completions[0].experts is None:
        return batch
    siblings = [group.completions for group in groups]
    rows = [(some[0].prompt_experts, *(each.experts for each in some)) for some in siblings]
    return with_experts(batch, torch.cat([x for parts in rows for x in parts]))


def advantages_of(batch: PackedBatch) -> Tensor:
    """(B,) advantages of the batch's completions, or (B, T) of their tokens."""
    if batch.has_column("advantages"):
        return batch.column("advantages")
    return batch.row_column("advantages")


@dataclass
class Rollout:
    """The completions that one rank sampled for its prompts, and their scores.

    Attributes:
        completions: P lists of G completions.
        texts: P * G decoded completions, without special tokens.
        rewards: (P, G) total rewards, NaN where a completion could not be scored.
        seconds: Wall-clock seconds of each phase.
        verdicts: Number of verdicts of each kind (posttrain.rewards.pieces).
        policy_version: Optimizer steps that the policy which sampled them had taken.
    """

    prompts: list[Prompt]
    completions: list[list[Completion]]
    texts: list[str]
    scores: Scores
    rewards: Tensor
    seconds: dict[str, float] = field(default_factory=dict)
    verdicts: dict[str, int] = field(default_factory=dict)
    policy_version: int = 0

    def groups(self, signal_of: str | None = None) -> list[Group]:
        """Make one group for each prompt.

        Args:
            signal_of: The reward whose standard deviation decides `Group.has_signal`; by default
                the total.
        """
        judged = self.rewards
        if signal_of is not None:
            values = [math.nan if v is None else v for v in self.scores.parts[signal_of]]
            judged = torch.tensor(values).view_as(self.rewards)
        rows = zip(self.prompts, self.completions, self.rewards, has_signal(judged), strict=True)
        return [Group(p, completions, row, bool(signal)) for p, completions, row, signal in rows]

    @property
    def flat(self) -> list[Completion]:
        """All P * G completions, one prompt's after the other's."""
        return [completion for siblings in self.completions for completion in siblings]


def has_signal(rewards: Tensor) -> Tensor:
    """Return for (P, G) rewards (P,) booleans: True where scored completions (not NaN) differ."""
    scored = ~rewards.isnan()
    highest = rewards.masked_fill(~scored, -torch.inf).amax(1)
    return highest > rewards.masked_fill(~scored, torch.inf).amin(1)


def success_rates(rollout: Rollout, reward: str) -> list[float | None]:
    """Mean reward of each group's scored completions, clamped to [0, 1]; None without any."""
    scores = iter(rollout.scores.parts[reward])
    groups = [[next(scores) for _ in siblings] for siblings in rollout.completions]
    known = [[score for score in group if score is not None] for group in groups]
    return [min(max(sum(k) / len(k), 0.0), 1.0) if k else None for k in known]


def roll_out(
    generator: Generator,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    rewards: Rewards,
    sampling: Sampling,
    num_generations: int,
    seeds: Sequence[Any],
    scoring: Scoring | None = None,
    trainer_state: TrainerState | None = None,
) -> Rollout:
    """Sample `num_generations` completions for each prompt and score them.

    The generator samples `rows_at_once` completions at a time; while it samples the next ones,
    those that are done are scored.

    Args:
        seeds: One for each prompt; see `posttrain.rollouts.sampling.uniforms`.
        trainer_state: Handed to the rewards that ask for it.
    """
    seconds = {"generate": 0.0}
    everything = len(prompts) * num_generations
    size = max(1, getattr(generator, "rows_at_once", everything) // num_generations)
    completions, texts, waiting = [], [], []
    for start in range(0, len(prompts), size):
        part = slice(start, start + size)
        begun = time.perf_counter()
        ids_of_prompts = [p["prompt_ids"] for p in prompts[part]]
        given: dict[str, Any] = {"seeds": seeds[part]}
        if "images" in prompts[0]:
            given["images"] = [p["images"] for p in prompts[part]]
        sampled = generator.generate(ids_of_prompts, sampling, num_generations, **given)
        ids = [completion.token_ids for siblings in sampled for completion in siblings]
        decoded = tokenizer.batch_decode(ids, skip_special_tokens=True)
        seconds["generate"] += time.perf_counter() - begun
        completions += sampled
        texts += decoded
        repeated = [prompt for prompt in prompts[part] for _ in range(num_generations)]
        columns = {name: [p[name] for p in repeated] for name in repeated[0] if name != "prompt"}
        columns["trainer_state"] = trainer_state
        scores = start_scoring(
            rewards,
            decoded,
            prompts=[p["prompt"] for p in repeated],
            completion_ids=ids,
            columns=columns,
            scoring=scoring,
        )
        waiting.append(scores)
    begun = time.perf_counter()
    scores = Scores.joined([wait() for wait in waiting])
    seconds["reward"] = time.perf_counter() - begun  # what generation did not hide
    matrix = torch.tensor(scores.totals).view(len(prompts), num_generations)
    verdicts = dict(take_verdicts())
    return Rollout(list(prompts), completions, texts, scores, matrix, seconds, verdicts)


ARGUMENTS = (("rewards",), ("rewards", "mask"), ("token_rewards", "mask"), ("groups",))

Advantage = Callable[..., Tensor]
Penalties = Sequence[Sequence[Tensor]]  # per group and completion: (T,), taken off the rewards


def assign_advantages(
    groups: Sequence[Group], advantage: Advantage, penalties: Penalties | None = None
) -> None:
    """Give the groups of this rank their advantages, as a function of all ranks' rewards.

    A collective: all ranks call it.

    Raises:
        ConfigError: The advantage has other arguments than those above.
    """
    names = arguments_of(advantage)
    if names == ("groups",):
        return _assign_to_tokens(groups, advantage(groups) if groups else [])
    is_of_tokens = "mask" in names
    # The penalties' lengths are also those of the completions; other advantages need no tokens.
    if penalties is None:
        sizes = [[len(c.token_ids) * is_of_tokens for c in group.completions] for group in groups]
        penalties = [[torch.zeros(size) for size in row] for row in sizes]
    everyone = from_all_ranks(([group.rewards for group in groups], penalties))
    rewards = [row for theirs, _ in everyone for row in theirs]
    if not rewards:
        return None
    first = sum(len(theirs) for theirs, _ in everyone[: rank_and_world()[0]])
    mine = slice(first, first + len(groups))
    inputs = _inputs(torch.stack(rewards), [group for _, theirs in everyone for group in theirs])
    found = advantage(*(inputs[name] for name in names))
    if not is_of_tokens:
        for group, row in zip(groups, found[mine], strict=True):
            group.advantages = row
        return None
    per_token = found.view(len(rewards), len(rewards[0]), -1)[mine]  # (P*G, T) -> (P, G, T)
    return _assign_to_tokens(groups, per_token)


def _assign_to_tokens(groups: Sequence[Group], per_token: Sequence[Tensor]) -> None:
    """Give each group its (G, T) advantages, without the padding."""
    for group, rows in zip(groups, per_token, strict=True):
        pairs = zip(rows, group.completions, strict=True)
        group.columns["advantages"] = [row[: len(c.token_ids)] for row, c in pairs]


def arguments_of(advantage: Advantage) -> tuple[str, ...]:
    """Return which of `ARGUMENTS` an advantage takes; a single argument may have any name."""
    parameters = inspect.signature(advantage).parameters.values()
    names = tuple(p.name for p in parameters if p.default is p.empty)
    is_any = len(names) == 1 and names not in (("token_rewards",), ("groups",))
    names = ("rewards",) if is_any else names
    if names not in ARGUMENTS:
        expected = " or ".join(f"f({', '.join(arguments)})" for arguments in ARGUMENTS)
        raise ConfigError(f"advantage: expected {expected}, found f({', '.join(names)}).")
    return names


def _inputs(rewards: Tensor, penalties: Penalties) -> dict[str, Tensor]:
    """Compute everything that an advantage may take, by the names of arguments."""
    rows = [row for group in penalties for row in group]
    penalty = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)  # (P*G, T)
    lengths, scores = torch.tensor([len(row) for row in rows]), rewards.flatten()
    mask = (torch.arange(penalty.shape[1]) < lengths[:, None]) & ~scores.isnan()[:, None]
    token_rewards = rlhf_token_rewards(
        scores.nan_to_num(), penalty, torch.zeros_like(penalty), mask, kl_coef=1.0
    )
    whole = rewards - penalty.sum(1).view_as(rewards)
    return {"rewards": whole, "token_rewards": token_rewards, "mask": mask}


def check_advantage(advantage: Callable[..., Tensor], num_generations: int) -> None:
    """Raise ConfigError where an advantage cannot take groups of this size."""
    completions = [Completion([0], [0.0], [0.0], finish_reason="stop")] * num_generations
    group = Group({"prompt_ids": [0]}, completions, torch.zeros(num_generations))
    try:
        assign_advantages([group], advantage)
    except ValueError as error:
        raise ConfigError(f"num_generations {num_generations}: {error}") from None
