"""Which prompts can be used, and which a rollout starts: in order, or Kimi k1.5's way, easy ones
first and then most often those that are answered worst.

    sampler = prompt_sampler(prompts, seed=0, difficulty="level", curriculum_rollouts=50)
    rows = sampler.take(rollout, 8)             # rows of the data
    sampler.report([(row, success_rate), …])    # when their completions have been scored

All ranks hold the same sampler and report the same, so they agree on what is taken. `state_dict`
is part of a checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from posttrain.errors import ConfigError, DataError
from posttrain.rewards.checks import find_unscorable
from posttrain.run.console import say

if TYPE_CHECKING:
    from datasets import Dataset

SEED_STRIDE = 1_000_003  # a prime: neighbouring run seeds share no seeds of completions
MAX_UNSCORABLE_SHARE = 0.1


def without_unscorable(
    prompts: Dataset, rewards: Mapping[str, tuple[Callable[..., Any], float]]
) -> Dataset:
    """Return the prompts less those whose gold answer or tests a reward cannot use, and log them.

    Raises ConfigError where they are more than `MAX_UNSCORABLE_SHARE`: a wrong column, most likely.
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
        raise ConfigError(f"{found} More than {MAX_UNSCORABLE_SHARE:.0%} is taken for a mistake.")
    say(f"{found} They are left out.")
    return prompts.select([i for i in range(len(prompts)) if i not in problems])


class PromptOrder:
    """The endless order of prompts: each pass over the data shuffled anew, by the seed alone."""

    def __init__(self, num_prompts: int, seed: int) -> None:
        self.num_prompts, self.seed = num_prompts, seed
        self._pass, self._order = -1, []

    def __getitem__(self, position: int) -> int:
        number, offset = divmod(position, self.num_prompts)
        if number != self._pass:
            generator = torch.Generator().manual_seed(self.seed * SEED_STRIDE + number)
            self._order = torch.randperm(self.num_prompts, generator=generator).tolist()
            self._pass = number
        return self._order[offset]


class PromptSampler(Protocol):
    """What the loader of partial rollouts asks for prompts."""

    def take(self, rollout: int, count: int) -> list[int]:
        """`count` rows of the data for this rollout, of all ranks."""
        ...

    def report(self, results: Sequence[tuple[int, float | None]]) -> None:
        """(row, share of its answers that were right, None where unknown) of finished groups."""
        ...

    def metrics(self, rollout: int) -> dict[str, float]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class InOrderSampler:
    """The endless shuffled order of `RolloutLoader`: every prompt once in each pass."""

    def __init__(self, num_prompts: int, *, seed: int) -> None:
        self.order = PromptOrder(num_prompts, seed)

    def take(self, rollout: int, count: int) -> list[int]:
        return [self.order[rollout * count + i] for i in range(count)]

    def report(self, results: Sequence[tuple[int, float | None]]) -> None:
        """The order does not depend on results."""

    def metrics(self, rollout: int) -> dict[str, float]:  # noqa: ARG002  (PromptSampler's signature)
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """There is none: a place in the order follows from the rollout."""


class Curriculum:
    """From easy to hard: the share of prompts that may be taken, the easiest first, grows in a line
    from `start_share` to all of them over `rollouts` rollouts.

    difficulty: a number for each prompt, small is easy; among equals the earlier row comes first.
    Source: Kimi k1.5 (2501.12599), curriculum sampling; how fast to go on is not published.
    """

    def __init__(
        self, difficulty: Sequence[float], *, rollouts: int, start_share: float = 0.2
    ) -> None:
        for row, value in enumerate(difficulty):
            if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
                raise DataError(
                    f"difficulty: expected a number for each prompt, found {value!r} at prompt "
                    f"{row + 1}. Small numbers are easy."
                )
        if rollouts < 1 or not 0 < start_share <= 1:
            raise ConfigError(
                f"curriculum: expected at least 1 rollout and a start_share in (0, 1], found "
                f"{rollouts} and {start_share}."
            )
        self.rows = sorted(range(len(difficulty)), key=lambda row: difficulty[row])
        self.rollouts, self.start_share = rollouts, start_share

    def share(self, rollout: int) -> float:
        """By hand: 0.2 at first, 0.6 half-way through, 1 from `rollouts` on."""
        progress = min(rollout / self.rollouts, 1.0)
        return self.start_share + (1 - self.start_share) * progress

    def admitted(self, rollout: int, at_least: int) -> list[int]:
        """Rows that may be taken: the easiest, `at_least` so many."""
        count = round(self.share(rollout) * len(self.rows))
        return self.rows[: max(count, at_least)]


def sampling_probabilities(
    success_rates: Float[Tensor, " P"], *, floor: float = 0.0
) -> Float[Tensor, " P"]:
    """max(1 - s_i, floor), divided by the sum over all prompts.

    `floor` in [0, 1] lets problems that are solved come back; 1 makes all prompts alike. Without
    one, a set that is wholly solved has no probabilities (NaN). By hand: s = 0.9, 0.5, 0, 1 give
    1/16, 5/16, 10/16, 0. Source: Kimi k1.5 (2501.12599), prioritized sampling; the floor is ours.
    """
    weights = (1 - success_rates).clamp(min=floor)
    return weights / weights.sum()


class PrioritizedSampler:
    """Prompts with `sampling_probabilities`, none twice at a time.

    A prompt's success rate is that of its latest group; before that, `success_rates` where given,
    such as the starting model's (None: unknown), else `prior`. floor: above 0, as above. Within a
    rollout, and while answers to it are unfinished, a prompt is not taken again.
    curriculum: which prompts may be taken at all.
    """

    def __init__(
        self,
        num_prompts: int,
        *,
        seed: int,
        floor: float = 0.1,
        prior: float = 0.5,
        success_rates: Sequence[float | None] | None = None,
        curriculum: Curriculum | None = None,
    ) -> None:
        if not 0 < floor <= 1 or not 0 <= prior <= 1:
            raise ConfigError(
                f"prompt sampling: expected a floor in (0, 1] and a prior in [0, 1], found {floor} "
                f"and {prior}."
            )
        self.num_prompts, self.seed, self.floor, self.curriculum = (
            num_prompts, seed, floor, curriculum
        )  # fmt: skip
        given = [None] * num_prompts if success_rates is None else success_rates
        for row, rate in enumerate(given):
            if rate is not None and not (isinstance(rate, int | float) and 0 <= rate <= 1):
                raise DataError(
                    f"success rates (column pass_rate): expected numbers in [0, 1], or None where "
                    f"unknown; found {rate!r} at prompt {row + 1}."
                )
        self.rates = torch.tensor([prior if s is None else s for s in given], dtype=torch.float64)
        self.found: dict[int, float] = {}  # latest success rates of this run
        self.busy: set[int] = set()

    def take(self, rollout: int, count: int) -> list[int]:
        """Without replacement, by the largest keys log(u) / p (Efraimidis and Spirakis, 2006)."""
        rows = self._free_rows(rollout, count)
        if len(rows) < count:
            raise ConfigError(
                f"expected {count} prompts that are not being answered, found {len(rows)} of "
                f"{self.num_prompts}. Lower the batch size, or add prompts."
            )
        random = torch.Generator().manual_seed(self.seed * SEED_STRIDE + rollout)
        noise = torch.rand(self.num_prompts, generator=random, dtype=torch.float64)
        probabilities = sampling_probabilities(self.rates[rows], floor=self.floor)
        chosen = (noise[rows].log() / probabilities).topk(count).indices
        # The largest keys come first, and with them the largest probabilities: mix them.
        mixed = chosen[torch.randperm(count, generator=random)]
        taken = [rows[i] for i in mixed.tolist()]
        self.busy.update(taken)
        return taken

    def _free_rows(self, rollout: int, count: int) -> list[int]:
        needed = count + len(self.busy)
        rows = self.curriculum.admitted(rollout, needed) if self.curriculum else None
        return [row for row in rows or range(self.num_prompts) if row not in self.busy]

    def report(self, results: Sequence[tuple[int, float | None]]) -> None:
        for row, success_rate in results:
            self.busy.discard(row)
            if success_rate is not None:
                self.found[row] = self.rates[row] = success_rate

    def metrics(self, rollout: int) -> dict[str, float]:
        """Shares of all prompts: with a success rate of this run; admitted by the curriculum."""
        found = {"prompts_seen": len(self.found) / self.num_prompts}
        if self.curriculum:
            found["curriculum_share"] = self.curriculum.share(rollout)
        return found

    def state_dict(self) -> dict[str, Any]:
        return {"found": sorted(self.found.items()), "busy": sorted(self.busy)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.report([(row, rate) for row, rate in state["found"]])
        self.busy = set(state["busy"])


def prompt_sampler(
    prompts: Any,
    *,
    seed: int,
    floor: float = 0.1,
    prior: float = 0.5,
    difficulty: str | None = None,
    curriculum_rollouts: int = 0,
) -> PrioritizedSampler:
    """A PrioritizedSampler from the columns of the data.

    Where there is a column `pass_rate` (of the starting model), it stands for the success rates
    before there are any. difficulty: a column of numbers, small is easy; None: 1 - `pass_rate`.
    curriculum_rollouts: how long the curriculum takes; 0: none.
    Raises ConfigError where the difficulty is missing, or not used.
    """
    columns = [name for name in prompts.column_names if name != "prompt_ids"]
    rates = prompts["pass_rate"] if "pass_rate" in columns else None
    settings = {"seed": seed, "floor": floor, "prior": prior, "success_rates": rates}
    if not curriculum_rollouts:
        if difficulty:
            raise ConfigError("--difficulty is for a curriculum: expected --curriculum_steps.")
        return PrioritizedSampler(len(prompts), **settings)
    if difficulty is None and rates is None:
        raise ConfigError(
            "a curriculum needs to know what is easy: expected --difficulty, a column of the data, "
            "or --pass_rate_generations, to measure it."
        )
    if difficulty is not None and difficulty not in columns:
        raise ConfigError(
            f"--difficulty: the data has no column {difficulty!r}; it has {', '.join(columns)}."
        )
    # A prompt that could not be scored counts as one that is never solved.
    hardness = prompts[difficulty] if difficulty else [1 - (rate or 0.0) for rate in rates]
    curriculum = Curriculum(hardness, rollouts=curriculum_rollouts)
    return PrioritizedSampler(len(prompts), **settings, curriculum=curriculum)
