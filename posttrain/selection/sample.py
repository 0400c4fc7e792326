"""Sample and score completions of every prompt of a data set, into one JSON line for each prompt.

    {"prompt": …, "answers": [{"text", "num_tokens", "finish_reason", "reward", "parts"}, …]}

A run that was stopped continues after the last whole batch of prompts. A completion depends only on
the seed and the prompt's index, and batches begin at the same prompts, so that a resumed run writes
the very file that it would have written without the stop.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.errors import ConfigError
from posttrain.rollouts.group import Prompt, Rollout
from posttrain.rollouts.options import SEED_STRIDE
from posttrain.run.options import describe_duration, say
from posttrain.selection.select import PROMPT_COLUMNS, read_groups

if TYPE_CHECKING:
    from datasets import Dataset

RollOut = Callable[[Sequence[Prompt], Sequence[int]], Rollout]

SAY_SECONDS = 5.0  # between two lines of progress


def sample_completions(
    path: Path,
    prompts: Dataset,
    roll_out: RollOut,
    *,
    prompts_per_batch: int,
    seed: int = 0,
) -> None:
    """Write the scored completions of `prompts` into the file at `path`.

    Whole batches that the file holds already are kept.

    Args:
        prompts: A dataset of load_prompts with keep_source.
        roll_out: f(prompts, seeds) -> scored completions.

    Raises:
        ConfigError: The file belongs to other prompts.
    """
    done = _keep_whole_batches(path, prompts, prompts_per_batch)
    if done:
        say(f"resume  completions of {done:,} of {len(prompts):,} prompts are in {path}")
    begun = said = time.monotonic()
    for start in range(done, len(prompts), prompts_per_batch):
        indices = range(start, min(start + prompts_per_batch, len(prompts)))
        seeds = [seed * SEED_STRIDE + index for index in indices]
        rollout = roll_out([prompts[index] for index in indices], seeds)
        lines = [json.dumps(group, ensure_ascii=False) + "\n" for group in _groups(rollout)]
        with path.open("a", encoding="utf-8") as file:
            file.write("".join(lines))
        now = time.monotonic()
        if now - said > SAY_SECONDS or indices.stop == len(prompts):
            said = now
            left = (now - begun) / (indices.stop - done) * (len(prompts) - indices.stop)
            say(_progress(rollout, indices.stop, len(prompts), left))


def _groups(rollout: Rollout) -> list[dict[str, Any]]:
    """Return the lines of one batch."""
    num_generations = len(rollout.completions[0])
    rewards = [None if math.isnan(total) else total for total in rollout.scores.totals]
    answers = [
        {
            "text": text,
            "num_tokens": len(completion.token_ids),
            "finish_reason": completion.finish_reason,
            "reward": reward,
            "parts": {name: part[row] for name, part in rollout.scores.parts.items()},
        }
        for row, (text, completion, reward) in enumerate(
            zip(rollout.texts, rollout.flat, rewards, strict=True)
        )
    ]
    return [
        _of_prompt(prompt)
        | {"answers": answers[row * num_generations : (row + 1) * num_generations]}
        for row, prompt in enumerate(rollout.prompts)
    ]


def _of_prompt(prompt: Prompt) -> dict[str, Any]:
    others = {name: prompt[name] for name in PROMPT_COLUMNS if prompt.get(name)}
    return {"prompt": json.loads(prompt["source_prompt"])} | others


def _keep_whole_batches(path: Path, prompts: Dataset, prompts_per_batch: int) -> int:
    """Truncate the file after its whole batches, and return the number of their prompts."""
    if not path.exists():
        return 0
    with path.open("rb") as file:
        ends = [0]
        for line in file:
            if line.endswith(b"\n"):
                ends.append(ends[-1] + len(line))
    done = len(ends) - 1
    if done < len(prompts):
        done -= done % prompts_per_batch
    os.truncate(path, ends[done])
    for row, group in enumerate(read_groups(path)):
        if row >= len(prompts) or group["prompt"] != json.loads(prompts[row]["source_prompt"]):
            raise ConfigError(
                f"{path}, line {row + 1}: expected prompt {row + 1} of the data, found another. "
                "The run was started with other data: use that data, or another --output_dir."
            )
    return done


def _progress(rollout: Rollout, done: int, total: int, seconds_left: float) -> str:
    scored = rollout.rewards[~rollout.rewards.isnan()]
    mean = f"mean reward {scored.mean().item():.3f}" if len(scored) else "no rewards"
    left = f"  {describe_duration(seconds_left)} left" if done < total else ""
    return f"prompt {done:,}/{total:,}  {mean}{left}"
