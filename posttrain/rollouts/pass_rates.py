"""Pass rates: the share of the starting model's completions that solve each prompt.

    name = fingerprint(model, prompts, sampling, "accuracy", 10)
    rates = cached_pass_rates(folder / name, lambda: measure_pass_rates(prompts, roll_out, …))
    prompts = with_pass_rates(prompts, rates)

They are measured once, by sampling n completions of every prompt, and kept in a file that is named
after everything they depend on: weights, data, reward and sampling. Kimi k1.5 (arXiv 2501.12599)
takes them for the difficulty of prompts, with n = 10 at a high temperature.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from posttrain.errors import ConfigError
from posttrain.rollouts.generator import ROWS_AT_ONCE
from posttrain.rollouts.group import Prompt, Rollout, success_rates
from posttrain.rollouts.sampling import Sampling
from posttrain.run.engine import from_all_ranks, rank_and_world
from posttrain.run.folder import write_whole
from posttrain.run.options import is_main_process, say

if TYPE_CHECKING:
    from datasets import Dataset

PASS_RATE_POSITION = 2**42  # where the seeds of these completions begin, far from all others

Rates = list[float | None]  # for each prompt a number in [0, 1], or None where it is unknown


def fingerprint(model: nn.Module, prompts: Dataset, sampling: Sampling, *other: object) -> str:
    """Return the SHA-256 (hexadecimal) of the weights, all columns of the prompts, and the `repr`
    of everything else given."""
    digest = hashlib.sha256(repr((sampling, *other)).encode())
    for name, weight in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(weight.float().cpu().numpy().tobytes())
    for column in sorted(prompts.column_names):
        digest.update(json.dumps([column, list(prompts[column])], default=str).encode())
    return digest.hexdigest()


def with_pass_rates(prompts: Dataset, rates: Rates | None = None) -> Dataset:
    """Return the prompts with a column `pass_rate`; without `rates` all are unknown (None).

    Raises:
        ConfigError: The data has such a column, and it would be unclear which one counts.
    """
    if "pass_rate" in prompts.column_names:
        raise ConfigError(
            "--pass_rate_generations: expected data without a column 'pass_rate', since it will "
            "be measured; found one. Leave the flag out to use it, or rename the column."
        )
    return prompts.add_column("pass_rate", list(rates or [None] * len(prompts)))


def cached_pass_rates(path: Path, measure: Callable[[], Rates]) -> Rates:
    """Read the rates from `path`, or measure them and write them there; all ranks get the same.

    A collective: every rank must call it, and `measure` runs on all ranks or on none.
    """
    is_kept = is_main_process() and path.is_file()
    found = from_all_ranks(json.loads(path.read_text()) if is_kept else None)[0]
    if found is not None:
        say(f"pass rates read from {path}")
        return found
    rates = measure()
    if is_main_process():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(rates))
    return rates


def measure_pass_rates(
    prompts: Dataset,
    roll_out: Callable[[list[Prompt], Sequence[int]], Rollout],
    *,
    reward: str,
    num_generations: int,
) -> Rates:
    """Measure, for each prompt, the mean of `reward` over its completions, clamped to [0, 1].

    A collective: each rank takes its share of the prompts, and all get the whole result.

    Args:
        roll_out: f(prompts, seeds) -> Rollout with `num_generations` completions of each prompt.
        reward: The name of the reward that says what is right.

    Returns:
        One rate for each prompt; None where no completion could be scored.
    """
    rank, world = rank_and_world()
    say(f"measuring the pass rates of {len(prompts):,} prompts, {num_generations} completions each")
    size = max(1, ROWS_AT_ONCE // num_generations)
    mine: dict[int, float | None] = {}
    for batch in range(math.ceil(len(prompts) / (size * world))):
        start = (batch * world + rank) * size
        rows = range(start, min(start + size, len(prompts)))
        # A rank without rows rolls out the first prompt: the others wait for it in collectives.
        asked = list(rows) or [0]
        rollout = roll_out([prompts[i] for i in asked], [PASS_RATE_POSITION + i for i in asked])
        mine.update(zip(rows, success_rates(rollout, reward), strict=False))
    found = {row: rate for share in from_all_ranks(mine) for row, rate in share.items()}
    return [found[row] for row in range(len(prompts))]
