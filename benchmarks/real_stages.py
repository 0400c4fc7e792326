"""What one process of the real run does: train a stage by one side, or score a model.

A stage's Job has the setting {"trainer": "module:function", "setting": {…}, "options": {…}}: the
function makes a trainer of the side's own setting and of options that both sides share.
"""

import importlib
import json
import re
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.child import Job

HASHED = re.compile(r"####\s*-?[\d,.]*\d\s*\Z")
FORMAT_REWARD = 0.2
MAX_COMPLETION = 160


def train(job: Job) -> dict:
    """Train a stage, and save its model unless the job is a search.

    CPU seconds are those of the process, from its start to the last optimizer step.
    """
    from benchmarks.measure import peak_gigabytes

    module, _, function = job.setting["trainer"].partition(":")
    make = getattr(importlib.import_module(module), function)
    inner = replace(job, setting=job.setting["setting"])
    trainer = make(inner, [], logging_steps=1, **job.setting["options"])
    before_train = time.process_time()
    trainer.train()
    found = {
        "cpu_seconds": time.process_time(),
        "train_cpu_seconds": time.process_time() - before_train,
        "peak_gb": peak_gigabytes(),
        "log": trainer.state.log_history,
    }
    if job.setting["saves"]:
        trainer.save_model(str(Path(job.folder) / "model"))
        trainer.processing_class.save_pretrained(Path(job.folder) / "model")
    return found


def our_dpo(job: Job, callbacks: list, **options: Any) -> Any:
    """Make our DPO trainer."""
    from benchmarks.dpo import our_trainer
    from benchmarks.measure import Clock

    return our_trainer(job, callbacks, Clock(), **options)


def peer_dpo(job: Job, callbacks: list, **options: Any) -> Any:
    """Make TRL's DPO trainer."""
    from benchmarks.dpo import peer_trainer
    from benchmarks.measure import Clock

    return peer_trainer(job, callbacks, Clock(), **options)


def our_grpo(job: Job, callbacks: list, **options: Any) -> Any:
    """Make our GRPO trainer, which samples with the built-in loop."""
    from benchmarks.groups import our_trainer

    sampling = _sampling(job.model)
    return our_trainer(job, callbacks, reward=gsm8k_reward, sampling=sampling, **options)


def peer_grpo(job: Job, callbacks: list, **options: Any) -> Any:
    """Make TRL's GRPO trainer, which samples with transformers' `generate`."""
    from benchmarks.groups import peer_trainer

    options["max_completion_length"] = MAX_COMPLETION
    return peer_trainer(job, callbacks, reward=gsm8k_reward, **options)


def gsm8k_reward(*, completions: list[str], answer: list[str], **_: Any) -> list[float]:
    """1 for the right number after `####` or in a box, and FORMAT_REWARD for ending in `#### n`."""
    from posttrain.rewards.math import verify_math

    return [
        (verify_math(gold, text, allow_hashes=True).score or 0.0)
        + FORMAT_REWARD * bool(HASHED.search(text))
        for gold, text in zip(answer, completions, strict=True)
    ]


def score(job: Job) -> dict:
    """Complete held-out problems greedily, and score held-out pairs by their log-probs.

    Returns `right`, one for each problem, and `pairs`, summed log-probs of chosen and rejected.
    """
    from posttrain.models.load import load_for_inference
    from posttrain.run.settings import ModelConfig

    data = json.loads(Path(job.data).read_text())
    model = load_for_inference(ModelConfig(model_name_or_path=job.model, dtype=job.dtype))
    problems = data["problems"] if job.setting["problems"] else []
    return {"right": _solved(model, job, problems), "pairs": _pair_logps(model, data["pairs"])}


def _solved(model: Any, job: Job, problems: list[dict]) -> list[bool]:
    from posttrain.models.load import load_tokenizer
    from posttrain.rewards.math import verify_math
    from posttrain.rollouts.generator import HFGenerator

    if not problems:
        return []
    tokenizer, sampling = load_tokenizer(job.model), replace(_sampling(job.model), temperature=0.0)
    prompts = [problem["prompt_ids"] for problem in problems]
    done = HFGenerator(model).generate(prompts, sampling, 1, seeds=range(len(prompts)))
    texts = [tokenizer.decode(only.token_ids, skip_special_tokens=True) for (only,) in done]
    answers = [problem["columns"]["answer"] for problem in problems]
    found = zip(answers, texts, strict=True)
    return [verify_math(gold, text, allow_hashes=True).score == 1.0 for gold, text in found]


def _pair_logps(model: Any, pairs: list[dict]) -> list[list[float]]:
    import torch

    from posttrain.packed.batch import pack_pairs
    from posttrain.packed.forward import packed_logps

    found = []
    with torch.no_grad():
        for pair in pairs:
            logps = packed_logps(model, pack_pairs([pair], device="cpu")).logps
            sizes = [len(pair["chosen_ids"]), len(pair["rejected_ids"])]
            found.append([part.sum().item() for part in logps.split(sizes)])
    return found


def _sampling(model: str) -> Any:
    from posttrain.data.encode import num_ids, stop_ids_of
    from posttrain.models.load import load_tokenizer
    from posttrain.rollouts.sampling import Sampling

    tokenizer = load_tokenizer(model)
    stops = stop_ids_of(model, tokenizer)
    return Sampling(MAX_COMPLETION, stops, vocabulary=num_ids(tokenizer))
