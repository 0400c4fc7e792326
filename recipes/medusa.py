"""Medusa heads: a few small heads that predict the tokens after the next one, to draft with.

    python recipes/medusa.py                                 tiny model, shipped data, 2 cores
    python recipes/medusa.py --own_completions               on what the model itself writes
    python recipes/medusa.py --train_model                   Medusa-2: the model learns along
    python recipes/medusa.py --config recipes/configs/medusa_qwen3_0.6b.yaml

Reads instructions, as sft.py does; writes the run folder, with the model and beside it model/heads,
which vLLM takes as the draft model of its method medusa. With h the model's last state and K heads

    p_k(y_{t+k+1}) = softmax(W_k (h_t + SiLU(A_k h_t + b_k))),  L1 = sum_k decay^k mean(-log p_k).

Medusa-1 minimises L1 and leaves the model as it is, to the bit. Medusa-2 minimises L_LM + lambda0
L1, after a warm-up of the heads alone. On the model's own completions L_LM becomes the KL to the
model with its adapter switched off, so that it goes on saying what it says. Heads that lie beside
the starting model are trained on.

Cai et al., Medusa, arXiv 2401.10774. Left out: a ramp of lambda0, several blocks a head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from common import begin
from heads_setup import HeadsConfig, documents_of

from posttrain.errors import ConfigError
from posttrain.run.options import bind, option, parse, plain_errors, say

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from posttrain.trainers.heads import HeadsTrainer

OF_JOINT = ("lambda0", "head_warmup_steps")
OF_OWN = ("temperature", "max_completion_length", "num_generations")


@dataclass(kw_only=True)
class Config(HeadsConfig):
    """Settings of a run that trains Medusa heads."""

    num_heads: int | None = option(
        None,
        "heads K: tokens after the next one that are drafted; none: those beside the model, else 4",
        at_least=1,
    )
    decay: float = option(0.8, "weight of head k is decay^k", above=0, at_most=1)
    train_model: bool = option(False, "train the model too (Medusa-2); Medusa-1 leaves it as it is")
    lambda0: float | None = option(
        None, "weight of the heads' loss beside the model's, with train_model; none: 0.2", above=0
    )
    head_learning_rate: float | None = option(
        None, "peak learning rate of the heads; none: learning_rate, 4 times it with train_model"
    )
    head_warmup_steps: int | None = option(
        None, "first steps in which the heads learn alone, with train_model; none: 0", at_least=0
    )
    own_completions: bool = option(
        False, "train on the model's own completions of the data's prompts"
    )
    temperature: float | None = option(
        None, "sampling temperature of own_completions; none: 1", above=0
    )
    max_completion_length: int | None = option(
        None, "longest of own_completions in tokens; none: 64", at_least=1
    )
    num_generations: int | None = option(
        None, "completions of each prompt with own_completions; none: 1", at_least=1
    )
    output_dir: str = "runs/medusa"
    learning_rate: float = 3e-3

    def check(self) -> None:
        """Raise ConfigError for settings that could not act."""
        for names, flag in ((OF_JOINT, "train_model"), (OF_OWN, "own_completions")):
            for name in names:
                if getattr(self, name) is not None and not getattr(self, flag):
                    raise ConfigError(f"{name}: expected --{flag} with it, found none.")
        if self.use_peft and not self.train_model:
            raise ConfigError(
                "use_peft: expected --train_model with it, found none: Medusa-1 trains the heads "
                "alone."
            )
        if self.own_completions and self.train_model and not self.use_peft:
            raise ConfigError(
                "own_completions: expected --use_peft with --train_model, whose adapter is "
                "switched off to be the teacher; found none."
            )


def main(config: Config) -> HeadsTrainer:
    """Train Medusa heads, and save the model with them to the run folder."""
    begin(config)

    from posttrain.heads.few import token_counts
    from posttrain.losses import medusa1_loss, medusa2_loss
    from posttrain.models.load import load_model, load_tokenizer
    from posttrain.trainers.fit import fit, training_arguments
    from posttrain.trainers.heads import HeadsTrainer, Joint

    tokenizer = load_tokenizer(config.model_name_or_path)
    documents, eval_documents = documents_of(config, tokenizer)
    args, model, callbacks = training_arguments(config), load_model(config), []
    if config.own_completions:
        documents, callbacks = own_data(config, documents, model, tokenizer)
    objective, rate = bind(medusa1_loss, decay=config.decay), config.head_learning_rate
    if config.train_model:
        joint = bind(medusa2_loss, decay=config.decay, lambda0=config.lambda0)
        warmup = config.head_warmup_steps or 0
        objective = Joint(joint, objective, warmup, distil=config.own_completions)
        rate = rate or 4 * config.learning_rate
    heads = make_heads(config, model)
    heads.draft_tokens_of(token_counts(documents, model.get_output_embeddings().out_features))
    trainer = HeadsTrainer(
        model,
        args,
        heads,
        objective,
        documents=documents,
        eval_documents=eval_documents,
        tokenizer=tokenizer,
        head_learning_rate=rate,
        max_tokens_per_microbatch=config.max_tokens_per_microbatch,
        callbacks=callbacks,
    )
    fit(trainer, config)
    return trainer


def make_heads(config: Config, model: nn.Module) -> nn.Module:
    """Return the heads beside the starting model, or new ones, and say which.

    Raises ConfigError where new ones would take the place of those.
    """
    from posttrain.heads import MedusaHeads, saved_heads

    found, source = saved_heads(model, config.model_name_or_path), config.model_name_or_path
    if found is None:
        number = config.num_heads or 4
        say(f"heads   {number} new Medusa heads, copies of the LM head")
        return MedusaHeads.on(model, num_heads=number)
    if found.kind != "medusa" or config.num_heads not in (None, found.depth):
        raise ConfigError(
            f"--num_heads: expected none or the number of Medusa heads beside {source}; it has "
            f"{found.depth} of kind {found.kind}, which new ones would take the place of."
        )
    say(f"heads   {found.depth} Medusa heads of {source}, trained on")
    return found


def own_data(
    config: Config, documents: Dataset, model: nn.Module, tokenizer: PreTrainedTokenizerBase
) -> tuple[Dataset, list]:
    """Return the model's own completions, and the callback that keeps them in the run folder."""
    import torch

    from posttrain.data.encode import num_ids, stop_ids_of
    from posttrain.rollouts.generator import HFGenerator
    from posttrain.rollouts.sampling import Sampling
    from posttrain.run.engine import half_dtype, this_device
    from posttrain.selection import own_completions as own

    found = own.kept_completions(config.output_dir) if config.resume else None
    if found is None:
        sampling = Sampling(
            config.max_completion_length or 64,
            stop_ids_of(config.model_name_or_path, tokenizer),
            config.temperature or 1.0,
            vocabulary=num_ids(tokenizer),
        )
        half = half_dtype(config.dtype)
        with torch.autocast(this_device().type, half, enabled=half is not None):
            found = own.own_completions(
                documents,
                HFGenerator(model, tokenizer=tokenizer),
                sampling,
                num_generations=config.num_generations or 1,
                seed=config.seed,
            )
    return found, [own.KeepCompletions(config.output_dir, found)]


if __name__ == "__main__":
    with plain_errors():
        main(parse(Config))
