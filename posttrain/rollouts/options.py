"""The settings of a source of rollouts: how many prompts, how they are generated, what trains.

options = RolloutOptions(updates_per_rollout=4, selection=Selection(max_refills=3))
Rollouts(prompts, rewards, sampling, num_generations=8, advantage=f, options=options)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from posttrain.errors import ConfigError, PosttrainError
from posttrain.rewards.call import Scoring
from posttrain.rewards.checks import find_unscorable
from posttrain.rollouts.policies import StartEngine
from posttrain.run.engine import from_all_ranks
from posttrain.run.options import say

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import nn

    from posttrain.rollouts.drafts import Heads
    from posttrain.rollouts.group import Rollout
    from posttrain.rollouts.lookahead import Lookahead
    from posttrain.run.settings import Acceptance, LookaheadName

NOT_IN_TRAINING = (
    "acceptance: expected exact, found typical, by which completions do not have the policy's "
    "distribution: what learns from samples, or is measured by them, cannot use it. "
    "`posttrain generate` has it."
)
FindHeads = Callable[[], "Callable[[nn.Module], Heads] | None"]

# Rollouts in a row, and groups in them, without a difference in reward, after which a run ends.
FLAT_ROLLOUTS, FLAT_GROUPS = 20, 100


@dataclass(frozen=True)
class RolloutPlan:
    """The number of prompts in a rollout, and its cut into batches.

    Attributes:
        prompts_per_batch: Prompts of this rank in one accumulation step.
        batches_per_rollout: Accumulation steps × optimizer steps that one rollout serves.
    """

    prompts_per_batch: int
    batches_per_rollout: int
    seed: int
    rank: int = 0
    world_size: int = 1

    @property
    def prompts_per_rollout(self) -> int:
        """Number of prompts in one rollout, summed over all ranks."""
        return self.prompts_per_batch * self.batches_per_rollout * self.world_size

    def positions(self, rollout: int) -> list[int]:
        """Return this rank's positions in the endless order of prompts, batch by batch.

        The ranks' batches of one accumulation step are neighbours in that order. So the number of
        ranks or of accumulation steps changes how an optimizer batch is cut, not what is in it.
        """
        size = self.prompts_per_batch
        first = rollout * self.prompts_per_rollout
        return [
            first + (batch * self.world_size + self.rank) * size + i
            for batch in range(self.batches_per_rollout)
            for i in range(size)
        ]


@dataclass(frozen=True)
class Selection:
    """The choice of the generated groups and completions that train.

    Attributes:
        max_refills: Dynamic sampling (DAPO, arXiv 2503.14476 section 3.2): a group whose rewards
            have standard deviation zero teaches nothing, so other prompts are sampled for it, in at
            most this many rounds; 0 keeps what was generated.
        signal_of: The reward whose standard deviation counts, such as "accuracy", since a length
            penalty nearly always varies; None takes the total.
        drop_truncated: Overlong filtering (DAPO, section 3.4): completions that were truncated
            count in their group's statistics and do not train.
    """

    max_refills: int = 0
    signal_of: str | None = None
    drop_truncated: bool = False

    def __post_init__(self) -> None:
        if self.max_refills < 0:
            raise ConfigError(f"max_refills: expected at least 0, found {self.max_refills}.")


@dataclass(frozen=True)
class RolloutOptions:
    """The settings of rollouts that most runs leave alone.

    Attributes:
        updates_per_rollout: Optimizer steps that the groups of one rollout are divided over.
        reward_kl_coef: Takes reward_kl_coef (log pi - log pi_ref) off the reward of each token, in
            reward units per nat (the k1 estimate, whose place this is: as a term of the loss its
            expected gradient is 0). InstructGPT (2203.02155) Eq. 2; RLOO (2402.14740).
        engine: Starts what generates instead of the decode loop on the model itself
            (posttrain.rollouts.vllm.start_vllm, with its settings bound).
        replay_routing: Train a mixture of experts with the experts that its tokens were sampled
            with (posttrain.packed.replay).
        overlap: Generate the next rollout while this one trains, by the policy before it.
        scoring: The settings of how rewards are called and added up.
        samples_path: A JSON-lines file that gets a few completions of each logged step.
        max_unscored_share: Ends the run at a rollout with a larger share of completions without a
            reward; None: at one without any reward.
        lookahead: Guesses tokens for the decode loop to verify; completions stay the same.
    """

    updates_per_rollout: int = 1
    selection: Selection = field(default_factory=Selection)
    scoring: Scoring = field(default_factory=Scoring)
    reward_kl_coef: float = 0.0
    engine: StartEngine | None = None
    replay_routing: bool = False
    overlap: bool = False
    samples_path: str | Path | None = None
    max_unscored_share: float | None = None
    lookahead: Lookahead | None = None

    def __post_init__(self) -> None:
        if self.updates_per_rollout < 1:
            raise ConfigError(
                f"updates_per_rollout: expected at least 1, found {self.updates_per_rollout}."
            )
        if self.replay_routing and self.engine is not None:
            raise ConfigError(
                "replay_routing: expected the decode loop on the model (--rollout hf), found an "
                "engine, which does not say what experts it chose."
            )
        if self.lookahead is not None and self.lookahead.acceptance != "exact":
            raise ConfigError(NOT_IN_TRAINING)
        if self.lookahead is None or self.lookahead.name == "auto":
            return
        if self.engine is not None:
            raise ConfigError(
                f"lookahead {self.lookahead.name}: expected the decode loop on the model "
                "(--rollout hf), found an engine. vLLM has its own setting, speculative_config."
            )
        if self.replay_routing:
            raise ConfigError(
                f"lookahead {self.lookahead.name}: expected no --replay_routing, found it: the "
                "experts of guessed tokens are not recorded. Take --lookahead none."
            )


def lookahead_of(
    name: LookaheadName, find_heads: FindHeads, acceptance: Acceptance = "exact"
) -> Lookahead | None:
    """Make what `--lookahead` names; None for none, and nothing is loaded for it.

    find_heads: returns what loads the heads beside the model, or None (posttrain.models.beside).
    """
    if acceptance != "exact" and name in ("none", "auto"):
        raise ConfigError(
            f"acceptance {acceptance}: expected --lookahead heads or ngram with it, found {name}, "
            "by which completions may be those of plain decoding."
        )
    if name == "none":
        return None
    from posttrain.rollouts.drafts import NGramDrafter
    from posttrain.rollouts.lookahead import Lookahead

    heads = None if name == "ngram" else find_heads()
    if name == "heads" and heads is None:
        raise ConfigError(
            "--lookahead heads: expected heads beside the model, found none. Train some, or take "
            "--lookahead ngram."
        )
    drafters = [] if name == "heads" else [NGramDrafter()]
    return Lookahead(name, drafters, heads=heads, acceptance=acceptance)


class NothingToLearnError(PosttrainError):
    """Rewards from which no policy could learn."""


class LearningCheck:
    """Ends a run that cannot learn: without rewards, or without any difference between them.

    Args:
        max_unscored_share: See `RolloutOptions`.
        compares: True where completions of a prompt are compared with each other.
    """

    def __init__(self, max_unscored_share: float | None, *, compares: bool) -> None:
        self.max_share, self.compares = max_unscored_share, compares
        self.flat, self.flat_groups = 0, 0  # in a row

    def read(self, rollouts: Sequence[Rollout], signals: Sequence[bool]) -> None:
        """Look at all ranks' rollouts; a collective.

        Args:
            signals: For each group of this rank, whether its rewards differ.

        Raises:
            NothingToLearnError: With the cause.
        """
        mine = (
            sum(rollout.scores.none for rollout in rollouts),
            sum(len(rollout.flat) for rollout in rollouts),
            any(signals),
            len(signals),
            next((cause for rollout in rollouts for cause in rollout.scores.causes()), ""),
        )
        everyone = from_all_ranks(mine)
        unscored, number = (sum(theirs[i] for theirs in everyone) for i in (0, 1))
        cause = next((theirs[4] for theirs in everyone if theirs[4]), "")
        limit = 1.0 if self.max_share is None else self.max_share
        if number and (unscored == number or unscored > limit * number):
            raise NothingToLearnError(
                f"{unscored:,} of {number:,} completions of a rollout have no reward, more than a "
                f"run can learn from (--max_unscored_share): {cause}."
            )
        differs = any(theirs[2] for theirs in everyone)
        if not number or not self.compares:
            return
        self.flat = 0 if differs else self.flat + 1
        groups = sum(theirs[3] for theirs in everyone)
        self.flat_groups = 0 if differs else self.flat_groups + groups
        if self.flat >= FLAT_ROLLOUTS and self.flat_groups >= FLAT_GROUPS:
            raise NothingToLearnError(
                f"in {self.flat} rollouts in a row all completions of each prompt got the same "
                "reward, so there is nothing to learn: all are right, or none is. Look into "
                "samples.jsonl, and take problems of another difficulty or another reward."
            )


def check_no_advantage(options: RolloutOptions) -> None:
    """Raise ConfigError for settings that act on advantages, where there are none."""
    given = {
        "reward_kl_coef": options.reward_kl_coef,
        "max_refills": options.selection.max_refills,
        "drop_truncated": options.selection.drop_truncated,
    }
    found = [name for name, value in given.items() if value]
    if found:
        raise ConfigError(
            f"{found[0]}: it acts on the advantages of groups, and these rollouts have none "
            "(advantage=None). An actor-critic objective has kl_coef, and takes every completion."
        )


SEED_STRIDE = 1_000_003  # a prime: neighbouring run seeds share no seeds of completions
MAX_UNSCORABLE_SHARE = 0.1


def without_unscorable(
    prompts: Dataset, rewards: Mapping[str, tuple[Callable[..., Any], float]]
) -> Dataset:
    """Leave out the prompts whose gold answer or tests a reward cannot use, and log them.

    Raises:
        ConfigError: More than `MAX_UNSCORABLE_SHARE` cannot be used: most likely a wrong column.
    """
    columns = {name: prompts[name] for name in prompts.column_names if name != "prompt_ids"}
    problems = find_unscorable(rewards, columns)
    if not problems:
        return prompts
    row, problem = next(iter(problems.items()))
    found = (
        f"{len(problems):,} of {len(prompts):,} prompts cannot be scored; the first: "
        f"{columns['prompt'][row][-60:]!r}, {problem}."
    )
    if len(problems) > MAX_UNSCORABLE_SHARE * len(prompts):
        raise ConfigError(f"{found} Expected at most {MAX_UNSCORABLE_SHARE:.0%}; check the column.")
    say(f"{found} They are left out.")
    return prompts.select([i for i in range(len(prompts)) if i not in problems])


class PromptOrder:
    """The endless order of prompts: each pass over the data is shuffled anew, by the seed alone.

    `order[position]` is a row of the data.
    """

    def __init__(self, num_prompts: int, seed: int) -> None:
        self.num_prompts, self.seed = num_prompts, seed
        self._pass = -1
        self._order: list[int] = []

    def __getitem__(self, position: int) -> int:
        number, offset = divmod(position, self.num_prompts)
        if number != self._pass:
            generator = torch.Generator().manual_seed(self.seed * SEED_STRIDE + number)
            self._order = torch.randperm(self.num_prompts, generator=generator).tolist()
            self._pass = number
        return self._order[offset]
