"""What our side has in common: the settings of a recipe, but for what is fixed for both sides."""

from dataclasses import dataclass
from typing import Any

from benchmarks.child import Job
from posttrain.run.settings import ModelConfig, RunConfig

LEARNING_RATE = 1e-5


@dataclass(kw_only=True)
class Settings(ModelConfig, RunConfig):
    """All defaults of the recipes but what a benchmark fixes for both sides."""

    output_dir: str


def settings(job: Job, **more: Any) -> Settings:
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
