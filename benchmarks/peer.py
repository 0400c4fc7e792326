"""Shared by TRL's side: its arguments, a model, batches that are cut and sorted.

The optimizer batch is the same on both sides. `micro_batch` of its examples go through the model
at once, the others are accumulated; sorted by length within the optimizer batch they need least
padding, which TRL's own length grouping, over the whole data, cannot better.
"""

from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.child import Job
from benchmarks.ours import LEARNING_RATE


def arguments(config_class: type, job: Job, **settings: Any) -> Any:
    """Make a TRL config: the values that are fixed for both sides, then `settings`."""
    import torch
    from transformers import AutoConfig

    fixed = {
        "output_dir": job.folder,
        "max_steps": job.warmup_steps + job.steps,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "train_sampling_strategy": "sequential",
        "logging_first_step": True,
        "gradient_checkpointing": False,
        "bf16": job.is_half,
        "use_cpu": not torch.cuda.is_available(),
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    if getattr(AutoConfig.from_pretrained(job.model), "router_aux_loss_coef", None):
        fixed["router_aux_loss_coef"] = 0.0  # TRL adds the config's balancing loss, ours if asked
    return config_class(**{**fixed, **settings})


def cut(job: Job, micro_batch: int) -> dict[str, int]:
    """Return the arguments that cut the optimizer batch into accumulated micro-batches."""
    return {
        "per_device_train_batch_size": micro_batch,
        "gradient_accumulation_steps": job.batch_size // micro_batch,
    }


def batches(job: Job, *, length: Callable[[dict], int] | None = None) -> list[list[dict]]:
    """Return a list of examples for each optimizer step, the longest first if `length` is given."""
    examples = job.examples()
    found = [examples[i : i + job.batch_size] for i in range(0, len(examples), job.batch_size)]
    return [sorted(batch, key=length, reverse=True) for batch in found] if length else found


def flat(found: Sequence[Sequence[dict]]) -> list[dict]:
    """Join batches into one list of examples."""
    return [example for batch in found for example in batch]


def load_causal(job: Job) -> Any:
    """Load the model as TRL trains it, in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32)


def load_tokenizer(job: Job) -> Any:
    """Load the model folder's tokenizer."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(job.model)


def halves(batch_size: int) -> list[int]:
    """Return the micro-batches to try: 8 -> [8, 4, 2, 1]."""
    return [size for size in (32, 16, 8, 4, 2, 1) if size <= batch_size and batch_size % size == 0]
