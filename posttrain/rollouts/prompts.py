"""Choose the prompts that a rollout starts: in order, or as Kimi k1.5 (arXiv 2501.12599) does,
easy ones first and then most often those with the lowest success rate.

    sampler = prompt_sampler(prompts, seed=0, difficulty="level", curriculum_rollouts=50)
    rows = sampler.take(rollout, 8)             # rows of the data
    sampler.report([(row, success_rate), …])    # when their completions have been scored

All ranks hold the same sampler and report the same results, so they agree on what is taken.
`state_dict` is part of a checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from posttrain.errors import ConfigError, DataError
from posttrain.rollouts.options import SEED_STRIDE, PromptOrder

if TYPE_CHECKING:
    from datasets import Dataset


class PromptSampler(Protocol):
    """Chooses the prompts of each rollout; posttrain.rollouts.partial_source asks it."""

    def take(self, rollout: int, count: int) -> list[int]:
        """Return the rows of the data that this rollout starts: `count`, summed over all ranks."""
        ...

    def report(self, results: Sequence[tuple[int, float | None]]) -> None:
        """Learn the results of finished groups of all ranks: (row, success rate); None: unknown."""
        ...

    def metrics(self, rollout: int) -> dict[str, float]:
        """Return what to log in this rollout, by name."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return the state as JSON types."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from the state of another sampler."""
        ...


class InOrderSampler:
    """Takes prompts in the shuffled order of posttrain.rollouts.source: each once in every pass."""

    def __init__(self, num_prompts: int, *, seed: int) -> None:
        self.order = PromptOrder(num_prompts, seed)

    def take(self, rollout: int, count: int) -> list[int]:
        """Return the next `count` rows of the order."""
        return [self.order[rollout * count + i] for i in range(count)]

    def report(self, results: Sequence[tuple[int, float | None]]) -> None:
        """Do nothing: the order does not depend on results."""

    def metrics(self, rollout: int) -> dict[str, float]:  # noqa: ARG002  (PromptSampler's signature)
        """Return no metrics."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Return no state: the position in the order follows from the rollout."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Do nothing: there is no state."""


class Curriculum:
    """Admits easy prompts first: the admitted share grows linearly from `start_share` to all
    prompts over `rollouts` rollouts.

    Source: Kimi k1.5 (arXiv 2501.12599), curriculum sampling; its pace is not published.

    Args:
        difficulty: A number for each prompt; small is easy. Of equals the earlier row comes first.
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
        """Return the share of prompts that are admitted.

        By hand, with start_share 0.2: 0.2 at first, 0.6 half-way through, 1 from `rollouts` on.
        """
        progress = min(rollout / self.rollouts, 1.0)
        return self.start_share + (1 - self.start_share) * progress

    def admitted(self, rollout: int, at_least: int) -> list[int]:
        """Return the admitted rows, the easiest first, and at least `at_least` of them."""
        count = round(self.share(rollout) * len(self.rows))
        return self.rows[: max(count, at_least)]


def sampling_probabilities(
    success_rates: Float[Tensor, " P"], *, floor: float = 0.0
) -> Float[Tensor, " P"]:
    """Return max(1 - s_i, floor), divided by its sum over all prompts.

    `floor` in [0, 1] lets solved problems come back; 1 gives all prompts the same probability. With
    floor 0, a set in which every problem is solved has no probabilities (NaN). By hand: s = 0.9,
    0.5, 0, 1 give 1/16, 5/16, 10/16, 0. Source: Kimi k1.5 (arXiv 2501.12599), prioritized sampling;
    the floor is ours.
    """
    weights = (1 - success_rates).clamp(min=floor)
    return weights / weights.sum()


class PrioritizedSampler:
    """Takes prompts with `sampling_probabilities`, and none twice at a time.

    A prompt's success rate is that of its latest group. Within a rollout, and while completions of
    it are unfinished, a prompt is not taken again.

    Args:
        floor: The floor of the probabilities, above 0 and at most 1.
        prior: Success rate of a prompt of which nothing is known.
        success_rates: Rates before a prompt's first group, such as the starting model's; None where
            unknown.
        curriculum: Decides which prompts may be taken at all.
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
        self.num_prompts, self.seed = num_prompts, seed
        self.floor, self.curriculum = floor, curriculum
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
        """Sample rows without replacement: those with the largest keys log(u) / p (Efraimidis and
        Spirakis, 2006)."""
        rows = self._free_rows(rollout, count)
        if len(rows) < count:
            raise ConfigError(
                f"expected {count} prompts without unfinished completions, found {len(rows)} of "
                f"{self.num_prompts}. Lower the batch size, or add prompts."
            )
        random = torch.Generator().manual_seed(self.seed * SEED_STRIDE + rollout)
        noise = torch.rand(self.num_prompts, generator=random, dtype=torch.float64)
        probabilities = sampling_probabilities(self.rates[rows], floor=self.floor)
        chosen = (noise[rows].log() / probabilities).topk(count).indices
        # Large keys come first, and with them large probabilities: shuffle, as ranks take slices.
        mixed = chosen[torch.randperm(count, generator=random)]
        taken = [rows[i] for i in mixed.tolist()]
        self.busy.update(taken)
        return taken

    def _free_rows(self, rollout: int, count: int) -> list[int]:
        needed = count + len(self.busy)
        rows = self.curriculum.admitted(rollout, needed) if self.curriculum else None
        return [row for row in rows or range(self.num_prompts) if row not in self.busy]

    def report(self, results: Sequence[tuple[int, float | None]]) -> None:
        """Note success rates, and let their prompts be taken again."""
        for row, success_rate in results:
            self.busy.discard(row)
            if success_rate is not None:
                self.found[row] = self.rates[row] = success_rate

    def metrics(self, rollout: int) -> dict[str, float]:
        """Return shares of all prompts: seen in this run, and admitted by the curriculum."""
        found = {"prompts_seen": len(self.found) / self.num_prompts}
        if self.curriculum:
            found["curriculum_share"] = self.curriculum.share(rollout)
        return found

    def state_dict(self) -> dict[str, Any]:
        """Return the success rates of this run, and the prompts that are not free."""
        return {"found": sorted(self.found.items()), "busy": sorted(self.busy)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from the state of another sampler over the same prompts."""
        self.report([(row, rate) for row, rate in state["found"]])
        self.busy = set(state["busy"])


def prompt_sampler(
    prompts: Dataset,
    *,
    seed: int,
    floor: float = 0.1,
    prior: float = 0.5,
    difficulty: str | None = None,
    curriculum_rollouts: int = 0,
) -> PrioritizedSampler:
    """Make a PrioritizedSampler from the columns of the data.

    A column `pass_rate` (of the starting model) gives the success rates before the first groups.

    Args:
        difficulty: A column of numbers; small is easy. None takes 1 - `pass_rate`.
        curriculum_rollouts: Number of rollouts until all prompts are admitted; 0: no curriculum.

    Raises:
        ConfigError: The difficulty is missing, or given without a curriculum.
    """
    columns = [name for name in prompts.column_names if name != "prompt_ids"]
    rates = prompts["pass_rate"] if "pass_rate" in columns else None
    settings = {"seed": seed, "floor": floor, "prior": prior, "success_rates": rates}
    if not curriculum_rollouts:
        if difficulty:
            raise ConfigError(
                "--difficulty is for a curriculum: expected --curriculum_steps above 0."
            )
        return PrioritizedSampler(len(prompts), **settings)
    if difficulty is None and rates is None:
        raise ConfigError(
            "a curriculum needs to know what is easy: expected --difficulty, a column of the data, "
            "or --pass_rate_generations above 0, which measures it."
        )
    if difficulty is not None and difficulty not in columns:
        raise ConfigError(
            f"--difficulty: the data has no column {difficulty!r}; it has {', '.join(columns)}."
        )
    # A prompt that could not be scored counts as one that is never solved.
    hardness = prompts[difficulty] if difficulty else [1 - (rate or 0.0) for rate in rates]
    curriculum = Curriculum(hardness, rollouts=curriculum_rollouts)
    return PrioritizedSampler(len(prompts), **settings, curriculum=curriculum)
