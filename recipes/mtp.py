"""Multi-token prediction: modules that predict the tokens after the next one, with their model.

    python recipes/mtp.py                                    tiny model, shipped data, 2 cores
    python recipes/mtp.py --no_train_model                   the modules alone
    python recipes/mtp.py --kind parallel --num_modules 3    Gloeckle's heads beside the last layer
    python recipes/mtp.py --config recipes/configs/mtp_qwen3_0.6b.yaml

Reads instructions, as sft.py does; writes the run folder. A checkpoint of DeepSeek V3, GLM-4 MoE,
Qwen3-Next or Qwen3.5 that has such modules keeps them: they are read, trained on, and written back
under the same names, as vLLM reads them (method mtp). Without them, D new ones are made. With k = 1
to D, the model's state h^0, and its LM head W

    h^k_i = norm(layer_k(M_k [norm(Emb(t_{i+k})); norm(h^{k-1}_i)])),
    p(t_{i+k+1}) = softmax(W h^k_i),    L = L_LM + (mtp_weight / D) sum_k mean(-log p).

DeepSeek-V3, arXiv 2412.19437 section 2.2; Gloeckle et al., 2404.19737, whose heads i = 2, 3 … are
layers beside the last one, with equal weights: L = L_LM + sum_i mean(-log p_i).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal

from common import begin
from heads_setup import HeadsConfig, documents_of

from posttrain.errors import ConfigError
from posttrain.run.options import bind, option, parse, plain_errors, say

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import nn

    from posttrain.trainers.heads import HeadsTrainer


@dataclass(kw_only=True)
class Config(HeadsConfig):
    """Settings of a run that trains modules for multi-token prediction."""

    kind: Literal["sequential", "parallel"] = option(
        "sequential", "DeepSeek-V3's modules one after the other, or Gloeckle's beside each other"
    )
    num_modules: int | None = option(
        None, "modules, or heads beside the model's own; none: the checkpoint's, else 1", at_least=1
    )
    order: Literal["embedding_hidden", "hidden_embedding"] | None = option(
        None, "what comes first in a new module's projection; none: embedding_hidden"
    )
    mtp_weight: float | None = option(
        None, "weight of the modules' loss; 0: they are kept as they are; none: 0.3", at_least=0
    )
    train_model: bool = option(True, "train the model too; otherwise it stays as it is")
    head_learning_rate: float | None = option(
        None, "peak learning rate of the modules; none: learning_rate", above=0
    )
    output_dir: str = "runs/mtp"
    learning_rate: float = 1e-3

    def check(self) -> None:
        """Raise ConfigError for settings that could not act."""
        if self.kind == "parallel":
            for name in ("order", "mtp_weight"):
                if getattr(self, name) is not None:
                    raise ConfigError(
                        f"{name}: expected --kind sequential with it, found parallel."
                    )
        if self.mtp_weight == 0 and not self.train_model:
            raise ConfigError(
                "mtp_weight: expected a weight above 0 with --no_train_model, found 0: nothing "
                "would train."
            )
        if self.quantization != "none":
            raise ConfigError(
                f"quantization: expected none, found {self.quantization}: modules start as copies "
                "of a layer, which needs its weights."
            )


def main(config: Config) -> HeadsTrainer:
    """Train modules with their model, and save both to the run folder."""
    begin(config)

    from posttrain.losses import mtp_loss, parallel_heads_loss
    from posttrain.models.load import load_model, load_tokenizer
    from posttrain.trainers.fit import fit, training_arguments
    from posttrain.trainers.heads import HeadsTrainer, Joint, beside_nll

    tokenizer = load_tokenizer(config.model_name_or_path)
    documents, eval_documents = documents_of(config, tokenizer)
    model = load_model(config)
    heads = make_heads(config, model, documents)
    if config.mtp_weight == 0:
        heads.requires_grad_(False)
    alone = parallel_heads_loss
    if config.kind == "sequential":
        alone = bind(mtp_loss, weight=config.mtp_weight)
    trainer = HeadsTrainer(
        model,
        training_arguments(config),
        heads,
        Joint(partial(beside_nll, loss=alone)) if config.train_model else alone,
        documents=documents,
        eval_documents=eval_documents,
        tokenizer=tokenizer,
        head_learning_rate=config.head_learning_rate,
        max_tokens_per_microbatch=config.max_tokens_per_microbatch,
    )
    fit(trainer, config)
    return trainer


def make_heads(config: Config, model: nn.Module, documents: Dataset) -> nn.Module:
    """Return the checkpoint's modules, or new ones, which draft the tokens of these documents.

    Raises ConfigError where new ones would take the place of those.
    """
    from posttrain.heads import MTPModules, ParallelHeads, saved_heads
    from posttrain.heads.few import token_counts

    number, source = config.num_modules or 1, config.model_name_or_path
    kind, found = config.kind, saved_heads(model, source)
    if found is not None:
        has = ({"mtp": "sequential"}.get(found.kind, found.kind), found.depth)
        order = getattr(found, "order", None)
        if has != (kind, config.num_modules or has[1]) or config.order not in (None, order):
            raise ConfigError(
                f"--kind, --num_modules, --order: expected those of {source}, which has {has[1]} "
                f"{has[0]} {order or ''}; new ones would take their place. Leave them out."
            )
        say(f"heads   {has[1]} {has[0]} of {source}, trained on")
        return found
    if config.kind == "parallel":
        say(f"heads   {number} new parallel, copies of the last layer")
        return ParallelHeads.on(model, num_heads=number + 1)
    say(f"heads   {number} new prediction modules, copies of the last layer with attention")
    made = MTPModules.on(model, num_modules=number, order=config.order or "embedding_hidden")
    made.draft_tokens_of(token_counts(documents, model.get_output_embeddings().out_features))
    return made


if __name__ == "__main__":
    with plain_errors():
        main(parse(Config))
