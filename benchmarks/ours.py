"""Settings of our side: those of a recipe, except for those that are fixed for both sides."""

from dataclasses import dataclass
from typing import Any

from benchmarks.child import Job
from posttrain.run.settings import ModelConfig, RunConfig

LEARNING_RATE = 1e-5


@dataclass(kw_only=True)
class Settings(ModelConfig, RunConfig):
    """All defaults of the recipes, except for those that a benchmark fixes for both sides."""

    output_dir: str


def settings(job: Job, **more: Any) -> Settings:
    """Make the settings of a job's run; `more` changes them."""
    fixed = {
        "model_name_or_path": job.model,
        "output_dir": job.folder,
        "dtype": job.dtype,
        "max_steps": job.warmup_steps + job.steps,
        "per_device_train_batch_size": job.batch_size,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "trainer": {"train_sampling_strategy": "sequential", "logging_first_step": True},
    }
    return Settings(**{**fixed, **job.setting, **more})
