"""R1-Zero: reinforcement learning from rule rewards alone, on a base model.

    python recipes/r1_zero.py                                tiny model, shipped problems, 2 cores
    python recipes/r1_zero.py --config recipes/configs/r1_zero_qwen2.5_1.5b.yaml --dataset my.jsonl
    accelerate launch --config_file accelerate_configs/zero3.yaml recipes/r1_zero.py \\
        --config recipes/configs/r1_zero_qwen2.5_1.5b.yaml

Reads problems (question, answer), writes the run folder: config.yaml, env.json, metrics.jsonl,
samples.jsonl, model/. For each prompt, G answers with rewards R_i = correct + format,

    A_i = (R_i - mean R) / (std R + 1e-4)                          GRPO, arXiv 2402.03300
    L = -(1/N) sum_i sum_t min(r A_i, clip(r, 1 - 0.2, 1 + 0.28) A_i)   DAPO, arXiv 2503.14476 Eq. 8

with r the ratio of a token's probability to that under which it was drawn, N the tokens of the
whole optimizer batch; `--beta` adds the k3 estimate of KL(pi || pi_ref). R1-Zero: arXiv 2501.12948.
Left out: dynamic sampling, overlong filtering, a moving reference.
"""

from dataclasses import dataclass
from functools import partial

from posttrain.config import option, parse, plain_errors
from posttrain.settings import ModelConfig, RunConfig
from posttrain.stages import BASE_MODEL, make_missing


@dataclass(kw_only=True)
class Config(ModelConfig, RunConfig):
    dataset: str = option("data/problems.jsonl", "file, folder or Hub name of the problems")
    eval_dataset: str | None = option("data/heldout.jsonl", "held-out problems, for eval_steps")
    template: str = option("r1_zero", "prompt format: r1_zero, chat, plain, …")
    max_prompt_length: int = option(512, "longest prompt in tokens; longer: dropped", at_least=1)
    max_completion_length: int = option(64, "longest answer in tokens; longer: cut", at_least=1)
    answers_per_prompt: int = option(16, "answers G drawn to each prompt", at_least=2)
    temperature: float = option(1.0, "sampling temperature, in training too", above=0)
    format_weight: float = option(0.2, "weight of the format reward; the answer's is 1", at_least=0)
    clip_low: float = option(0.2, "the ratio may fall by this much", above=0, at_most=1)
    clip_high: float = option(0.28, "the ratio may rise by this much", above=0)
    beta: float = option(0.0, "weight of the KL to the reference; 0: no reference", at_least=0)
    updates_per_rollout: int = option(1, "optimizer steps for each rollout", at_least=1)
    model_name_or_path: str = BASE_MODEL
    output_dir: str = "runs/r1_zero"
    per_device_train_batch_size: int = 128
    max_steps: int = option(80, "optimizer steps", at_least=1)
    learning_rate: float = 1e-4
    warmup_steps: float = 0.05


def main(config: Config):
    make_missing(config.model_name_or_path)

    from posttrain.advantages import group_advantages
    from posttrain.data import load_prompts
    from posttrain.data.encoding import Encoder
    from posttrain.losses import clipped_policy_loss
    from posttrain.models.loading import load_model, load_tokenizer
    from posttrain.rewards.format import think_answer_format
    from posttrain.rewards.math import math_reward
    from posttrain.rollouts.sampling import Sampling
    from posttrain.runs import open_run
    from posttrain.trainers.fit import fit, training_arguments
    from posttrain.trainers.rl import RLTrainer

    tokenizer = load_tokenizer(config.model_name_or_path)
    settings = {"template": config.template, "max_prompt_length": config.max_prompt_length}
    prompts, eval_prompts = load_prompts(config.dataset, tokenizer, **settings), None
    if config.eval_steps:
        eval_prompts = load_prompts(config.eval_dataset, tokenizer, split="test", **settings)
    # Rewards read the answer alone: they must know if the prompt already holds <think>.
    prefilled = {"prefilled_think": config.template == "r1_zero_think"}
    correct = partial(math_reward, **prefilled)
    well_formed = partial(think_answer_format, **prefilled)
    stop_ids = tuple(Encoder(tokenizer).end_ids)
    run = open_run(config.output_dir, config, resume=config.resume)
    trainer = RLTrainer(
        load_model(config),
        training_arguments(config),
        prompts=prompts,
        eval_prompts=eval_prompts,
        tokenizer=tokenizer,
        rewards={"accuracy": (correct, 1.0), "format": (well_formed, config.format_weight)},
        sampling=Sampling(config.max_completion_length, stop_ids, config.temperature),
        answers_per_prompt=config.answers_per_prompt,
        advantage=group_advantages,
        loss=partial(clipped_policy_loss, clip_low=config.clip_low, clip_high=config.clip_high),
        per="token",
        beta=config.beta,
        updates_per_rollout=config.updates_per_rollout,
        samples_path=run / "samples.jsonl",
        max_tokens_per_microbatch=config.max_tokens_per_microbatch,
    )
    fit(trainer, config)
    return trainer


if __name__ == "__main__":
    with plain_errors():
        main(parse(Config))
