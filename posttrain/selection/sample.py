"""Answers to every prompt of a data set, scored, one JSON line a prompt as soon as they are there.

    {"prompt": …, "answers": [{"text", "num_tokens", "finish_reason", "reward", "parts"}, …]}

A run that was stopped goes on behind the last whole batch of prompts. An answer hangs on the seed
and the place of its prompt, and batches are cut at the same places, so that a resumed run writes
the very file that it would have written in one go.
"""

import json
import math
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from posttrain.errors import ConfigError
from posttrain.rewards.call import Scoring
from posttrain.rollouts.group import Rollout, roll_out
from posttrain.rollouts.prompts import SEED_STRIDE
from posttrain.rollouts.sampling import Sampling
from posttrain.run.console import say
from posttrain.run.progress import describe_duration
from posttrain.selection.select import PROMPT_COLUMNS, read_groups

SAY_SECONDS = 5.0  # between two lines of progress


def draw_answers(
    path: Path,
    prompts: Any,
    *,
    generator: Any,
    tokenizer: Any,
    rewards: Mapping[str, tuple[Callable, float]],
    sampling: Sampling,
    num_generations: int,
    prompts_per_batch: int,
    seed: int = 0,
    scoring: Scoring | None = None,
) -> None:
    """Write `num_generations` scored answers to each of `prompts` into the file at `path`.

    prompts: of load_prompts with keep_source. rewards (checked), scoring: as RLTrainer has them.
    What the file holds already is kept, all whole batches of it.

    Raises ConfigError where the file belongs to other prompts.
    """
    done = _keep_whole_batches(path, prompts, prompts_per_batch)
    if done:
        say(f"resume  answers to {done:,} of {len(prompts):,} prompts are in {path}")
    begun = said = time.monotonic()
    for start in range(done, len(prompts), prompts_per_batch):
        places = range(start, min(start + prompts_per_batch, len(prompts)))
        rollout = roll_out(
            generator,
            tokenizer,
            [prompts[place] for place in places],
            rewards=rewards,
            sampling=sampling,
            num_generations=num_generations,
            seeds=[seed * SEED_STRIDE + place for place in places],
            scoring=scoring,
        )
        lines = [json.dumps(group, ensure_ascii=False) + "\n" for group in _groups(rollout)]
        with path.open("a", encoding="utf-8") as file:
            file.write("".join(lines))
        now = time.monotonic()
        if now - said > SAY_SECONDS or places.stop == len(prompts):
            said = now
            left = (now - begun) / (places.stop - done) * (len(prompts) - places.stop)
            say(_progress(rollout, places.stop, len(prompts), left))


def _groups(rollout: Rollout) -> list[dict[str, Any]]:
    """The lines of one batch."""
    num_answers = len(rollout.completions[0])
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
            zip(rollout.texts, rollout.answers, rewards, strict=True)
        )
    ]
    return [
        _of_prompt(prompt) | {"answers": answers[row * num_answers : (row + 1) * num_answers]}
        for row, prompt in enumerate(rollout.prompts)
    ]


def _of_prompt(prompt: dict[str, Any]) -> dict[str, Any]:
    others = {name: prompt[name] for name in PROMPT_COLUMNS if prompt.get(name)}
    return {"prompt": json.loads(prompt["source_prompt"])} | others


def _keep_whole_batches(path: Path, prompts: Any, prompts_per_batch: int) -> int:
    """The number of prompts that need no drawing; the file ends behind their lines."""
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
    for place, group in enumerate(read_groups(path)):
        if place >= len(prompts) or group["prompt"] != json.loads(prompts[place]["source_prompt"]):
            raise ConfigError(
                f"{path}, line {place + 1}: its prompt is not the one of the data now. The run was "
                "started with other data; take that again, or another --output_dir."
            )
    return done


def _progress(rollout: Rollout, done: int, total: int, seconds_left: float) -> str:
    scored = rollout.rewards[~rollout.rewards.isnan()]
    mean = f"mean reward {scored.mean().item():.3f}" if len(scored) else "no rewards"
    left = f"  {describe_duration(seconds_left)} left" if done < total else ""
    return f"prompt {done:,}/{total:,}  {mean}{left}"
