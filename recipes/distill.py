"""Distillation: a student learns from a teacher, from its texts, distributions or judgement.

    python recipes/distill.py                                tiny models, shipped data, 2 cores
    python recipes/distill.py --method on_policy --teacher my/teacher --dataset my.jsonl
    python recipes/distill.py --teacher_url http://localhost:8000/v1 --top_k 20 --lmbda 0
    accelerate launch --config_file accelerate_configs/ddp.yaml recipes/distill.py \\
        --config recipes/configs/distill_qwen3_0.6b.yaml

Reads instructions with answers, or prompts where the student writes all completions; writes the run
folder as recipes/sft.py does. With p the teacher and q the student, the loss of a token is

    gkd        beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q (beta 0: the
               forward KL; 1: the reverse KL), on the data's completions and, for a share lmbda of
               the examples, on the student's own (GKD, arXiv 2306.13649 Eq. 1, Algorithm 1)
    minillm    KL(q || p) - R log q(y), R the mean of log p/q over the later tokens of the student's
               own completion (MiniLLM, arXiv 2306.08543 Eq. 3 and 6, without its teacher-mixed
               sampling and language-model loss)
    on_policy  -A log q(y), A = log p(y) - log q(y), on the student's own completions (On-Policy
               Distillation, Thinking Machines Lab 2025)
    sft        -log q(y) on completions that the teacher writes first

Left out: evaluation in between (posttrain evaluate judges the saved model), vLLM, images.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from common import DPO_MODEL, SFT_MODEL, begin

from posttrain.errors import ConfigError
from posttrain.run.options import option, parse, plain_errors
from posttrain.run.settings import ModelConfig, RunConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from posttrain.trainers.base import PackedTrainer
    from posttrain.trainers.distill import Distillation

Method = Literal["gkd", "minillm", "on_policy", "sft"]
ADAPTER_OFF, RECORDED, GIVEN = "adapter_off", "recorded", "given"
# Settings that one method alone has.
OF_METHOD = {
    "beta": "gkd",
    "lmbda": "gkd",
    "nll_weight": "gkd",
    "top_k": "gkd",
    "discount": "on_policy",
    "max_prompts": "sft",
}


@dataclass(kw_only=True)
class Config(ModelConfig, RunConfig):
    """Settings of recipes/distill.py."""

    method: Method = option("gkd", "what is learned: see the top of recipes/distill.py")
    teacher: str = option(
        DPO_MODEL,
        "folder or Hub name of the teacher, also an earlier checkpoint; adapter_off: the student "
        "without its adapter; recorded: top-k log-probs in the data; given, for sft: the data",
    )
    teacher_url: str | None = option(
        None, "URL of an OpenAI-compatible server that is the teacher instead"
    )
    teacher_model: str | None = option(None, "name of the model on that server")
    teacher_key_variable: str = option(
        "TEACHER_API_KEY", "environment variable that holds the server's key"
    )
    teacher_api: Literal["prompt_logprobs", "echo"] = option(
        "prompt_logprobs", "how the server is asked for log-probs: as vLLM, or as OpenAI's echo"
    )
    top_k: int | None = option(
        None, "most likely tokens at each place, of a server; none: 20", at_least=1
    )
    beta: float | None = option(
        None,
        "0: forward KL, 1: reverse KL, between: generalised JSD; none: 0.5",
        at_least=0,
        at_most=1,
    )
    lmbda: float | None = option(
        None,
        "share of examples that the student completes itself; none: 0.5",
        at_least=0,
        at_most=1,
    )
    discount: float | None = option(
        None, "of the later tokens' log-ratios in an advantage; none: 0", at_least=0, at_most=1
    )
    nll_weight: float | None = option(
        None,
        "weight of the negative log-prob of given completions, beside the divergence; none: 0",
        above=0,
    )
    dataset: str = option("data/sft.jsonl", "instructions with answers, or prompts")
    template: str = option("auto", "prompt format: auto, alpaca, chat, plain")
    max_length: int = option(512, "tokens of the longest document", at_least=2)
    max_completion_length: int = option(
        64, "longest completion in tokens; longer ones are truncated", at_least=1
    )
    temperature: float = option(
        1.0, "of sampling, and of the distributions that are compared", above=0
    )
    max_prompts: int | None = option(
        None, "prompts that the teacher completes, for sft; none: all", at_least=1
    )
    model_name_or_path: str = SFT_MODEL
    output_dir: str = "runs/distill"
    max_steps: int = 60
    per_device_train_batch_size: int = 32
    learning_rate: float = 1e-3

    def check(self) -> None:
        """Raise ConfigError for settings that the method or the teacher does not have."""
        for name, method in OF_METHOD.items():
            if getattr(self, name) is not None and self.method != method:
                raise ConfigError(
                    f"{name}: expected --method {method} with it, found {self.method}."
                )
        if self.uses_top_k and self.beta:
            raise ConfigError(
                "beta: of a server's top-k log-probs only the forward KL can be computed; "
                f"expected 0 or none, found {self.beta:g}."
            )
        if self.uses_top_k and self.method in ("minillm", "on_policy"):
            raise ConfigError(
                f"method: expected gkd or sft with a teacher that gives top-k log-probs, found "
                f"{self.method}."
            )
        if self.top_k is not None and not self.teacher_url:
            raise ConfigError("top_k: expected --teacher_url with it, found none.")
        kinds = {ADAPTER_OFF: "gkd", RECORDED: "gkd", GIVEN: "sft"}
        kind = "" if self.teacher_url else kinds.get(self.teacher, "")
        if kind and kind != self.method:
            raise ConfigError(
                f"teacher: expected --method {kind} with {self.teacher}, found {self.method}."
            )
        alone = self.teacher == self.model_name_or_path and not self.teacher_url
        if alone and self.method != "sft" and not self.nll_weight:
            raise ConfigError(
                f"teacher: it is the student, {self.teacher}, so there is nothing to learn. "
                "Expected another model, or an earlier or later checkpoint of it."
            )

    @property
    def uses_top_k(self) -> bool:
        """True where the teacher is known by its most likely tokens."""
        return self.method != "sft" and (bool(self.teacher_url) or self.teacher == RECORDED)

    @property
    def on_policy_share(self) -> float:
        """The share of examples that the student completes itself."""
        if self.method != "gkd":
            return float(self.method != "sft")
        default = 0.0 if self.teacher == RECORDED and not self.teacher_url else 0.5
        return default if self.lmbda is None else self.lmbda


def main(config: Config) -> PackedTrainer:
    """Train a student as the settings say, and return the trainer."""
    needs_teacher = not config.teacher_url and config.teacher not in (ADAPTER_OFF, RECORDED, GIVEN)
    begin(config, config.teacher if needs_teacher else None)

    from distill_teachers import load_rows, make_teacher, taught_documents

    from posttrain.models.load import load_model, load_tokenizer
    from posttrain.trainers.distill import DistillTrainer
    from posttrain.trainers.fit import fit, training_arguments
    from posttrain.trainers.sft import SFTTrainer

    tokenizer = load_tokenizer(config.model_name_or_path)
    common = {"tokenizer": tokenizer, "max_tokens_per_microbatch": config.max_tokens_per_microbatch}
    if config.method == "sft":
        documents = taught_documents(config, tokenizer)
        arguments = training_arguments(config)
        trainer = SFTTrainer(load_model(config), arguments, documents=documents, **common)
    else:
        rows = load_rows(config, tokenizer)
        teacher = make_teacher(config, tokenizer, rows)
        trainer = DistillTrainer(
            load_model(config),
            training_arguments(config),
            documents=rows,
            teacher=teacher,
            plan=plan_of(config, tokenizer),
            **common,
        )
    fit(trainer, config)
    return trainer


def plan_of(config: Config, tokenizer: PreTrainedTokenizerBase) -> Distillation:
    """Return the loss and the share of on-policy completions that a method means."""
    from functools import partial

    from posttrain import losses as L
    from posttrain.data.encode import num_ids, stop_ids_of
    from posttrain.rollouts.sampling import Sampling
    from posttrain.run.options import bind
    from posttrain.trainers.distill import Distillation

    jsd, sampling = L.generalised_jsd_with_slope, None
    divergence = {
        "gkd": L.top_k_kl_with_slope if config.uses_top_k else bind(jsd, beta=config.beta),
        "minillm": partial(jsd, beta=1.0),
        "on_policy": None,
    }
    advantage = {
        "gkd": None,
        "minillm": L.minillm_advantages,
        "on_policy": bind(L.reverse_kl_advantages, discount=config.discount),
    }
    if config.on_policy_share or config.temperature != 1:
        stop_ids = stop_ids_of(config.model_name_or_path, tokenizer)
        sampling = Sampling(
            config.max_completion_length,
            stop_ids,
            config.temperature,
            vocabulary=num_ids(tokenizer),
        )
    return Distillation(
        divergence[config.method],
        advantage[config.method],
        nll_weight=config.nll_weight or 0.0,
        on_policy=config.on_policy_share,
        sampling=sampling,
    )


if __name__ == "__main__":
    with plain_errors():
        main(parse(Config))
