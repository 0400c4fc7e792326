"""`posttrain evaluate`: a saved model's accuracy, format and length on held-out problems.

    posttrain evaluate runs/sft/model --dataset data/heldout.jsonl --template alpaca
    posttrain evaluate runs/sft/model --template alpaca --num_samples 8 --prm runs/prm/model
    posttrain evaluate runs/sft/model --lm_eval gsm8k ifeval      # by lm-eval, if it is installed
    evaluate_model("runs/sft/model", "data/heldout.jsonl", rewards=…, template="alpaca", …)

The model is loaded fresh from disk, and completions are scored by the rewards that RL trains with.
Every number is a mean over problems, with a 95 % interval over problems; with several samples of
each there are also pass@k, maj@k and best of k (posttrain.commands.estimates).
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from posttrain.commands.estimates import SCORE, Problem, table
from posttrain.errors import ConfigError
from posttrain.run.options import option, parse, plain_errors, say
from posttrain.run.settings import LookaheadName, ModelConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from posttrain.rollouts.group import Rollout

BATCH_SIZE = 256  # completions that are sampled at once

Rewards = Mapping[str, tuple[Callable, float]]


@dataclass(kw_only=True)
class Config:
    """Settings of one evaluation."""

    model: str = option(help="folder or Hub name of the model; also as the first argument")
    dataset: str = option("data/heldout.jsonl", "problems: file, folder or Hub name")
    template: str = option("r1_zero", "prompt format: r1_zero, alpaca, chat, plain, …")
    max_completion_length: int = option(512, "tokens of the longest completion", at_least=1)
    num_samples: int = option(1, "completions of each problem", at_least=1)
    k: list[int] | None = option(
        None, "the k of pass@k, maj@k and best of k; none: powers of two, and num_samples"
    )
    temperature: float | None = option(
        None, "sampling temperature; 0 is greedy; none: 0 for one sample, 1 for several", at_least=0
    )
    lookahead: LookaheadName = option(
        "none", "guess tokens to generate faster, with the same completions"
    )
    reward: str = option("math", "what accuracy is: math, code, exact, choice, FILE.py:FUNCTION")
    best_by: str | None = option(
        None, "reward whose highest is the best of k: a name as for reward, format, or FILE.py:F"
    )
    reward_model: str | None = option(None, "reward model whose highest score is the best of k")
    prm: str | None = option(None, "process reward model whose highest score is the best of k")
    lm_eval: list[str] | None = option(
        None,
        "tasks that lm-eval measures the model by, in the place of all else; it must be installed",
    )
    prm_aggregate: Literal["min", "product", "last"] = option(
        "min", "one number from the probabilities that steps are right"
    )

    def check(self) -> None:
        """Raise ConfigError where samples are too few for k, or all alike, or judged twice."""
        if bad := [k for k in self.k or () if not 1 <= k <= self.num_samples]:
            raise ConfigError(
                f"k: expected 1 to --num_samples ({self.num_samples}), found {bad[0]}."
            )
        if self.num_samples > 1 and self.temperature == 0:
            raise ConfigError(
                "temperature: expected above 0 with --num_samples above 1, found 0: all samples "
                "of a problem would be the same."
            )
        chosen = [name for name in ("best_by", "reward_model", "prm") if getattr(self, name)]
        if len(chosen) > 1:
            raise ConfigError(
                f"{chosen[1]}: expected one judge of the best, found {chosen[0]} too."
            )
        if chosen and self.num_samples == 1:
            raise ConfigError(f"{chosen[0]}: expected --num_samples above 1 with it, found 1.")

    @property
    def ks(self) -> list[int]:
        """The k to report: those asked for, else powers of two below the samples, and all."""
        powers = [2**i for i in range(1, 31) if 2**i < self.num_samples]
        everything = [self.num_samples] if self.num_samples > 1 else []
        return sorted(set(self.k)) if self.k else [*powers, *everything]


def main(argv: Sequence[str]) -> None:
    """Print the means over all problems; the first argument without a flag is the model."""
    argv = list(argv)
    if argv and not argv[0].startswith("-"):
        argv = ["--model", *argv]
    config = parse(Config, argv)
    with plain_errors():
        if config.lm_eval:
            hand_over(config.model, config.lm_eval)
            return
        usual = 0.0 if config.num_samples == 1 else 1.0
        problems = sample_problems(
            config.model,
            config.dataset,
            rewards=_rewards(config),
            template=config.template,
            max_tokens=config.max_completion_length,
            temperature=usual if config.temperature is None else config.temperature,
            lookahead=config.lookahead,
            num_samples=config.num_samples,
            judge=_judge(config),
        )
        for line in table(problems, config.ks):
            say(line)


def hand_over(model: str, tasks: Sequence[str]) -> None:
    """Let lm-eval measure a model, an adapter over its base, in a process of its own.

    Raises:
        ConfigError: lm-eval is not installed, or fails.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError(
            "lm_eval: expected its package, found none. Install it with: pip install lm-eval"
        )
    adapter, about = Path(model) / "adapter_config.json", f"pretrained={model}"
    if adapter.is_file():
        base = json.loads(adapter.read_text(encoding="utf-8"))["base_model_name_or_path"]
        about = f"pretrained={base},peft={model},tokenizer={model}"
    command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args", about]
    command += ["--batch_size", "auto"]  # its own is one prompt at a time
    done = subprocess.run([*command, "--tasks", ",".join(tasks)], check=False)
    if done.returncode:
        raise ConfigError(f"lm_eval: it ended with status {done.returncode}; its lines say why.")


def _known() -> dict[str, Callable]:
    from posttrain.rewards.choice import choice_reward, exact_match_reward
    from posttrain.rewards.code import code_reward
    from posttrain.rewards.math import math_reward

    return {
        "math": math_reward,
        "code": code_reward,
        "exact": exact_match_reward,
        "choice": choice_reward,
    }


def _rewards(config: Config) -> dict[str, tuple[Callable, float]]:
    from posttrain.rewards.checks import load_reward
    from posttrain.rewards.format import think_answer_format

    accuracy = load_reward(config.reward, _known())
    found = {"accuracy": (accuracy, 1.0), "format": (think_answer_format, 1.0)}
    if config.best_by:
        known = {**_known(), "format": think_answer_format}
        found[SCORE] = (load_reward(config.best_by, known, setting="best_by"), 1.0)
    return found


def _judge(config: Config) -> Callable[[PreTrainedTokenizerBase], Callable] | None:
    """The function that loads the model that chooses the best; None without one."""
    if config.prm:
        from posttrain.models.process_reward import load_process_reward

        prm = ModelConfig(model_name_or_path=config.prm)
        return partial(load_process_reward, prm, aggregate=config.prm_aggregate)
    if config.reward_model:
        from posttrain.models.reward_model import load_reward

        return partial(load_reward, ModelConfig(model_name_or_path=config.reward_model))
    return None


def evaluate_model(
    model_name_or_path: str,
    dataset: str | Sequence[dict],
    *,
    rewards: Rewards,
    template: str,
    max_tokens: int,
    temperature: float = 0.0,
    lookahead: LookaheadName = "none",
    split: str = "train",
    num_samples: int = 1,
) -> dict[str, float]:
    """Complete each prompt; return the mean of each reward, and `mean_completion_tokens`.

    The arguments are those of `sample_problems`. A reward's mean leaves out those that could not be
    scored.
    """
    problems = sample_problems(
        model_name_or_path,
        dataset,
        rewards=rewards,
        template=template,
        max_tokens=max_tokens,
        temperature=temperature,
        lookahead=lookahead,
        split=split,
        num_samples=num_samples,
    )
    means = {}
    for name in rewards:
        scored = [v for problem in problems for v in problem.parts[name] if v is not None]
        means[name] = sum(scored) / max(1, len(scored))
    tokens = sum(sum(problem.lengths) for problem in problems)
    return {**means, "mean_completion_tokens": tokens / (len(problems) * num_samples)}


def sample_problems(
    model_name_or_path: str,
    dataset: str | Sequence[dict],
    *,
    rewards: Rewards,
    template: str,
    max_tokens: int,
    temperature: float = 0.0,
    lookahead: LookaheadName = "none",
    split: str = "train",
    num_samples: int = 1,
    judge: Callable[[PreTrainedTokenizerBase], Callable] | None = None,
) -> list[Problem]:
    """Complete each prompt `num_samples` times, and score every completion.

    Args:
        dataset: a file, folder or Hub name, or rows (posttrain.data.load_prompts).
        rewards: {name: (function, weight)}, as RLTrainer takes them; weights do not matter here.
        max_tokens: of a completion; longer ones are cut, and scored as they are.
        temperature: 0 is greedy.
        lookahead: what guesses tokens (posttrain.rollouts.lookahead).
        judge: f(tokenizer) -> a reward, scored beside the others under the name of SCORE.
        split: of a Hub dataset or a folder.
    """
    from posttrain.data import load_prompts
    from posttrain.data.encode import num_ids, stop_ids_of
    from posttrain.models.beside import heads_beside
    from posttrain.models.load import load_for_inference, load_tokenizer
    from posttrain.rollouts.generator import HFGenerator
    from posttrain.rollouts.group import roll_out
    from posttrain.rollouts.options import lookahead_of
    from posttrain.rollouts.sampling import Sampling

    tokenizer = load_tokenizer(model_name_or_path)
    prompts = load_prompts(dataset, tokenizer, template=template, split=split, say=lambda _: None)
    rewards = {**rewards, SCORE: (judge(tokenizer), 1.0)} if judge else rewards
    model = load_for_inference(ModelConfig(model_name_or_path=model_name_or_path))
    stop_ids = stop_ids_of(model_name_or_path, tokenizer)
    sampling = Sampling(max_tokens, stop_ids, temperature, vocabulary=num_ids(tokenizer))
    ahead = lookahead_of(lookahead, partial(heads_beside, model_name_or_path))
    problems, size = [], max(1, BATCH_SIZE // num_samples)
    for start in range(0, len(prompts), size):
        rows = range(start, min(start + size, len(prompts)))
        rollout = roll_out(
            HFGenerator(model, lookahead=ahead),
            tokenizer,
            [prompts[i] for i in rows],
            rewards=rewards,
            sampling=sampling,
            num_generations=num_samples,
            seeds=rows,
        )
        problems += _problems(rollout, num_samples)
    return problems


def _problems(rollout: Rollout, num_samples: int) -> list[Problem]:
    """Take a rollout apart; answers are compared only where there are several samples."""
    from posttrain.rewards.majority import group_answers

    found = []
    for number, (prompt, samples) in enumerate(
        zip(rollout.prompts, rollout.completions, strict=True)
    ):
        mine = slice(number * num_samples, (number + 1) * num_samples)
        votes: list[int | None] = [None] * num_samples
        if num_samples > 1:
            votes = group_answers(rollout.texts[mine], [prompt["prompt"]] * num_samples)
        parts = {name: values[mine] for name, values in rollout.scores.parts.items()}
        found.append(Problem(parts, [len(sample.token_ids) for sample in samples], votes))
    return found
