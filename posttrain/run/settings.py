"""Settings that recipes share: which model, how a run goes, and for RL what is generated.

Plain dataclasses that need no torch. A recipe inherits them and adds its own fields; it may replace
a default by plain assignment (`learning_rate: float = 5e-7`), which keeps the help and the range
written here.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from posttrain.errors import ConfigError
from posttrain.run.options import option
from posttrain.run.sources import did_you_mean
from posttrain.run.trackers import check_trackers

Attention = Literal["auto", "sdpa", "varlen", "flash_attention_2", "flash_attention_3", "rows"]
# The schedules of transformers.SchedulerType that train without a metric to watch.
Schedule = Literal[
    "cosine",
    "linear",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
    "polynomial",
    "cosine_with_restarts",
    "cosine_with_min_lr",
    "warmup_stable_decay",
]

LookaheadName = Literal["none", "ngram", "heads", "auto"]
Acceptance = Literal["exact", "typical"]

# The fields of TrainingArguments that `trainer:` may set, and their types. The others have a
# setting of their own, would be ignored, or would break that cutting a batch changes nothing, or
# that a resumed run ends as an uninterrupted one.
ALLOWED: dict[str, type] = {
    "activation_checkpointing_kwargs": dict,
    "adam_beta1": float,
    "adam_epsilon": float,
    "data_seed": int,
    "dataloader_num_workers": int,
    "dataloader_persistent_workers": bool,
    "dataloader_pin_memory": bool,
    "dataloader_prefetch_factor": int,
    "ddp_backend": str,
    "ddp_bucket_cap_mb": int,
    "ddp_static_graph": bool,
    "eval_delay": float,
    "eval_on_start": bool,
    "full_determinism": bool,
    "log_level": str,
    "log_level_replica": str,
    "log_on_each_node": bool,
    "logging_first_step": bool,
    "lr_scheduler_kwargs": dict,
    "optim": str,
    "optim_args": str,
    "per_device_eval_batch_size": int,
    "project": str,
    "run_name": str,
    "tf32": bool,
    "torch_empty_cache_steps": int,
    "train_sampling_strategy": str,
}
OF_LORA = (
    *("lora_target_modules", "lora_modules_to_save", "lora_skip_experts"),
    *("use_rslora", "use_dora", "quantization"),
)


@dataclass(kw_only=True)
class ModelConfig:
    """Settings of the model: which one, how it computes, and whether LoRA trains it."""

    model_name_or_path: str = option(help="folder or Hub name of the starting model")
    attn_implementation: Attention = option("auto", "packed attention, or rows; auto chooses")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto", "number format to compute in; auto chooses and reports it"
    )
    gradient_checkpointing: bool = option(
        False, "recompute activations: less memory, about 1/3 slower"
    )
    router_aux_loss_coef: float | None = option(
        None,
        "weight of the loss that balances experts; none: as the model's config asks",
        at_least=0,
    )
    use_peft: bool = option(False, "train LoRA adapters instead of the model's own weights")
    lora_r: int = option(16, "LoRA rank", at_least=1)
    lora_alpha: int = option(32, "LoRA scale: updates are multiplied by alpha / rank", at_least=1)
    lora_dropout: float = option(
        0.0, "LoRA dropout: share of inputs that are dropped", at_least=0, at_most=1
    )
    lora_target_modules: list[str] | None = option(
        None, "names of layers that get LoRA; none: all linear ones but the head"
    )
    lora_modules_to_save: list[str] | None = option(
        None, "names of layers that are trained whole, beside LoRA, and saved with it"
    )
    lora_skip_experts: bool = option(False, "no LoRA in blocks whose experts are one weight")
    use_rslora: bool = option(False, "scale LoRA by alpha / sqrt(rank) (rank-stabilised LoRA)")
    use_dora: bool = option(False, "train the norm of each weight's columns beside LoRA (DoRA)")
    quantization: Literal["none", "nf4", "int8"] = option(
        "none", "format of the frozen weights under LoRA: 4 or 8 bits by bitsandbytes (QLoRA)"
    )

    def check(self) -> None:
        """Raise ConfigError for settings of LoRA without it, or a format without its package."""
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        if not self.use_peft:
            for name in OF_LORA:
                if getattr(self, name) != defaults[name]:
                    raise ConfigError(f"{name}: expected --use_peft with it, found none: no LoRA.")
        if self.quantization != "none":
            _refuse_without_bitsandbytes("quantization", self.quantization)


@dataclass(kw_only=True)
class RunConfig:
    """Settings of a run: steps, learning rate, batches, intervals and the run folder."""

    output_dir: str = option(help="run folder; an earlier run in it is moved aside")
    seed: int = option(
        0, "seed of data order, initialisation and sampling", at_least=0, at_most=2**32 - 1
    )
    max_steps: int = option(-1, "optimizer steps; -1: num_train_epochs decides", at_least=-1)
    num_train_epochs: float = option(1.0, "passes over the data", above=0)
    learning_rate: float = option(2e-5, "peak learning rate", above=0)
    lr_scheduler_type: Schedule = option("cosine", "schedule of the learning rate after warm-up")
    warmup_steps: float = option(
        0.0, "warm-up in steps; below 1: as a share of all steps", at_least=0
    )
    weight_decay: float = option(0.0, "AdamW's decoupled weight decay", at_least=0)
    adam_beta2: float = option(
        0.999, "AdamW's decay rate of the mean squared gradient", above=0, at_most=1
    )
    max_grad_norm: float = option(
        1.0, "largest gradient norm, beyond it gradients are clipped; 0: never", at_least=0
    )
    per_device_train_batch_size: int = option(
        8,
        "examples per process and accumulation step (documents, pairs or completions)",
        at_least=1,
    )
    gradient_accumulation_steps: int = option(
        1, "accumulation steps per optimizer step; they multiply the batch", at_least=1
    )
    max_tokens_per_microbatch: int | None = option(
        None,
        "packed tokens per forward: bounds memory, does not change the batch; none: 16384, or "
        "2048 on a CPU",
        at_least=1,
    )
    logging_steps: int = option(10, "optimizer steps between two log lines", at_least=1)
    eval_steps: int = option(0, "optimizer steps between two evaluations; 0: none", at_least=0)
    save_steps: int = option(0, "optimizer steps between two checkpoints; 0: none", at_least=0)
    save_total_limit: int = option(2, "complete checkpoints to keep", at_least=1)
    resume: bool = option(False, "continue from the newest complete checkpoint in output_dir")
    allow_changed: bool = option(
        False, "resume although data, rewards or the starting model have changed since the start"
    )
    timeout_seconds: float = option(
        1800.0, "seconds that a rank may be waited for by the others before the run ends", above=0
    )
    exit_zero_on_stop: bool = option(
        False, "status 0, not 143, 130 or 129, after a save that a signal asked for"
    )
    report_steps: int = option(
        0, "steps between refreshes of report.html; 0: at the end only", at_least=0
    )
    dry_run: bool = option(False, "say what the run would do, and train nothing")
    report_to: str = option(
        "none",
        "trackers besides metrics.jsonl, by commas: tensorboard, trackio, wandb, mlflow …",
    )
    push_to_hub: bool = option(False, "send the saved model to the Hugging Face Hub at the end")
    hub_model_id: str | None = option(None, "its name there; none: that of output_dir")
    hub_private_repo: bool = option(False, "make its repository private")
    trainer: dict[str, Any] = option({}, "other fields of transformers.TrainingArguments")

    def check(self) -> None:
        """Raise ConfigError for steps, evaluations or trainer fields that cannot work."""
        if self.max_steps == 0:
            raise ConfigError("max_steps: expected -1 or at least 1, found 0.")
        if self.eval_steps and not getattr(self, "eval_dataset", None):
            raise ConfigError(
                f"eval_steps: expected 0 without an eval_dataset; found {self.eval_steps}."
            )
        own = {field.name for field in dataclasses.fields(self)}
        check_trainer_keys(self.trainer, own=own)
        check_trackers(self.report_to)
        if not self.push_to_hub and (self.hub_model_id or self.hub_private_repo):
            raise ConfigError("hub_model_id, hub_private_repo: expected with --push_to_hub alone.")
        if self.push_to_hub:
            from posttrain.run.hub import check_push

            check_push(self)


def check_trainer_keys(trainer: Mapping[str, object], *, own: Collection[str]) -> None:
    """Raise ConfigError for fields or values under `trainer:` that cannot work.

    Args:
        own: the names of the recipe's own settings.
    """
    for key, value in trainer.items():
        if key in own:
            raise ConfigError(f"trainer.{key}: expected no value here: it is the setting --{key}.")
        if key not in ALLOWED:
            if key not in training_argument_names():
                near = did_you_mean(key, ALLOWED)
                raise ConfigError(
                    f"trainer.{key}: expected a field of transformers.TrainingArguments.{near}"
                )
            raise ConfigError(
                f"trainer.{key}: expected one of {', '.join(ALLOWED)}. This one is chosen by the "
                "trainer, would have no effect, or would break that batches may be cut and runs "
                "resumed without a difference."
            )
        if key == "optim" and value not in (known := optimizer_names()):
            near = did_you_mean(str(value), known)
            raise ConfigError(f"trainer.optim: expected {', '.join(known)}, found {value!r}.{near}")
        if key == "optim" and ("8bit" in value or "paged" in value):
            _refuse_without_bitsandbytes("trainer.optim", value)
        kind = ALLOWED[key]
        fits = isinstance(value, (int, float) if kind is float else kind)
        if not fits or (isinstance(value, bool) and kind is not bool):
            raise ConfigError(f"trainer.{key}: expected {KIND_WORDS[kind]}, found {value!r}.")


def _refuse_without_bitsandbytes(setting: str, value: str) -> None:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            f"{setting}: expected the package bitsandbytes for {value}, which is not installed. "
            "Install it with: pip install 'posttrain[bitsandbytes]'"
        )


KIND_WORDS = {
    bool: "true or false",
    dict: "a mapping",
    float: "a number",
    int: "a whole number",
    str: "text",
}


@cache
def training_argument_names() -> frozenset[str]:
    """List the fields of transformers.TrainingArguments."""
    fields = _class_body("TrainingArguments")
    return frozenset(n.target.id for n in fields if isinstance(n, ast.AnnAssign))


@cache
def optimizer_names() -> list[str]:
    """List the values of `optim` that transformers knows."""
    return [n.value.value for n in _class_body("OptimizerNames") if isinstance(n, ast.Assign)]


def _class_body(name: str) -> list[ast.stmt]:
    """Read a class of transformers' training_args.py from its source, as importing is slow."""
    package = importlib.util.find_spec("transformers")
    if package is None or package.origin is None:
        raise ConfigError("trainer: expected the transformers package to be installed.")
    source = Path(package.origin).with_name("training_args.py").read_text(encoding="utf-8")
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return node.body
    raise AssertionError(f"{name} is not in transformers' training_args.py any more")


@dataclass(kw_only=True)
class CompletionConfig:
    """Settings of prompts, of how completions are generated, and of how rules score them."""

    dataset: str = option("data/problems.jsonl", "problems: file, folder or Hub name")
    template: str = option("r1_zero", "prompt format: r1_zero, chat, plain, …")
    max_prompt_length: int = option(
        512, "longest prompt in tokens; longer ones are dropped", at_least=1
    )
    max_completion_length: int = option(
        64, "longest completion in tokens; longer ones are truncated", at_least=1
    )
    num_generations: int = option(
        16, "completions G for each prompt", at_least=2, was="answers_per_prompt"
    )
    temperature: float = option(1.0, "sampling temperature, in training too", above=0)
    lookahead: LookaheadName = option(
        "none", "guess tokens to generate faster, with the same completions"
    )
    reward: str = option(
        "math", "accuracy reward: math, code, exact, choice, FILE.py:FUNCTION, a judge's FILE.yaml"
    )
    format_weight: float = option(0.2, "weight of the format reward; accuracy's is 1", at_least=0)
    overlong_tokens: int = option(
        0, "last tokens of a completion that are penalised, by up to 1", at_least=0
    )
    reward_timeout: float = option(
        30.0, "seconds a reward may take for one prompt's completions, or for one", above=0
    )
    reward_workers: int | None = option(
        None, "processes that run the rewards; 0 runs them in this one", at_least=0
    )


@dataclass(kw_only=True)
class RLConfig(CompletionConfig, ModelConfig, RunConfig):
    """A model, a run, and completions: what every RL recipe on problems has."""

    max_unscored_share: float | None = option(
        None,
        "share of a rollout's completions without a reward that ends the run; none: all of them",
        above=0,
        at_most=1,
    )
    eval_dataset: str | None = option("data/heldout.jsonl", "held-out problems, for eval_steps")
    model_name_or_path: str = "runs/base/model"
    per_device_train_batch_size: int = 128
    max_steps: int = option(80, "optimizer steps", at_least=1)
    learning_rate: float = 1e-4
    warmup_steps: float = 0.05

    def check(self) -> None:
        """Raise ConfigError unless batches are whole groups, and steps use up whole rollouts."""
        batch, updates = self.per_device_train_batch_size, getattr(self, "updates_per_rollout", 1)
        if batch % self.num_generations:
            raise ConfigError(
                "per_device_train_batch_size: it counts completions; expected a multiple of "
                f"--num_generations ({self.num_generations}), found {batch}."
            )
        for name in ("max_steps", "save_steps"):
            if getattr(self, name) % updates:
                raise ConfigError(
                    f"{name}: expected a multiple of --updates_per_rollout ({updates}), so that "
                    f"rollouts are used up; found {getattr(self, name)}."
                )


@dataclass(kw_only=True)
class GroupConfig(RLConfig):
    """Adds how groups are sampled and selected, and what bounds a step, for any algorithm."""

    updates_per_rollout: int = option(1, "optimizer steps for each rollout", at_least=1)
    max_refills: int = option(
        0, "rounds of new prompts for groups whose rewards are all equal; 0: none", at_least=0
    )
    drop_truncated: bool = option(False, "leave truncated completions out of training")
    top_p: float = option(
        1.0, "sample from the most likely tokens of this share; 1: all", above=0, at_most=1
    )
    top_k: int = option(0, "sample from the k most likely tokens; 0 turns it off", at_least=0)
    max_step_kl: float | None = option(
        None, "largest KL of one optimizer step, in nats per token", above=0
    )
    reference_sync_steps: int = option(
        0, "steps after which the reference becomes the policy; 0: never"
    )
