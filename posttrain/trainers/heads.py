"""Train heads that look ahead, with their model or without moving it.

    trainer = HeadsTrainer(model, args, heads, medusa1_loss, documents=documents, …)
    trainer = HeadsTrainer(model, args, heads, Joint(partial(beside_nll, loss=mtp_loss)), …)

The objective is a function of the log-probs of the targets, the model's own and each head's, and
of their counts over the whole optimizer batch. Where the model itself has no loss, it runs without
gradient and stays as it is to the bit. The heads are saved beside it (posttrain.heads.files).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import TrainerCallback

from posttrain.errors import ConfigError
from posttrain.heads import add_heads, heads_of, save_heads, scores_ahead, trunk_states
from posttrain.heads.ahead import count_ahead
from posttrain.heads.attach import ScoresAhead, without_heads
from posttrain.heads.files import restore_heads
from posttrain.packed.batch import Segment, pack, upload
from posttrain.trainers.sft import SFTTrainer

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import TrainingArguments

# f(heads, totals=…) of the heads alone, f(base, heads, totals=…) with the model's own: log-probs of
# the targets of each, and their counts over the whole optimizer batch -> the loss, or this
# micro-batch's part of it. medusa1_loss and medusa2_loss of posttrain.losses are such.
HeadsLoss = Callable[..., Tensor]


class Joint(NamedTuple):
    """Says what is minimised with the model, and what before it moves.

    Attributes:
        loss: with the model's own log-probs.
        alone: of the heads by themselves, in the first `warmup_steps` optimizer steps, in which the
            model stays as it is; None and 0 where it moves from the first step on.
        distil: the model's own loss is its KL to the model without the adapter.
    """

    loss: HeadsLoss
    alone: HeadsLoss | None = None
    warmup_steps: int = 0
    distil: bool = False


def beside_nll(base: Tensor, heads: Sequence[Tensor], *, totals: Tensor, loss: HeadsLoss) -> Tensor:
    """Add a loss of heads, such as posttrain.losses.mtp_loss, to the model's own mean of -log p."""
    return loss(heads, totals=totals[1:]) - base.sum() / totals[0].clamp(min=1)


class HeadsTrainer(SFTTrainer):
    """SFTTrainer of a model with heads; see the module's docstring.

    Args:
        heads: of posttrain.heads, made on this model; frozen ones are kept and saved as they are.
        objective: a loss of heads alone (the model is frozen), or a Joint one.
        head_learning_rate: peak rate of the heads; none: the model's.
    """

    def __init__(
        self,
        model: nn.Module,
        args: TrainingArguments,
        heads: nn.Module,
        objective: HeadsLoss | Joint,
        *,
        documents: Dataset,
        head_learning_rate: float | None = None,
        **settings: object,
    ) -> None:
        self.objective, self.head_learning_rate = objective, head_learning_rate
        joint = isinstance(objective, Joint)
        self.teaches_to_stop = joint and not objective.distil
        if not joint:
            model.requires_grad_(False)
        if joint and objective.distil and not hasattr(model, "disable_adapter"):
            raise ConfigError(
                "self-distillation: expected --use_peft, whose adapter is switched off to be the "
                "teacher; found none."
            )
        add_heads(model, heads)
        super().__init__(model, args, documents=documents, **settings)
        self._offsets = (1, *range(heads.first_offset, heads.first_offset + heads.depth))
        # Over the whole batch of a step, or the whole evaluation set: (1 + K,) and the first.
        self._totals, self._count = torch.ones(len(self._offsets)), 1
        if joint and objective.warmup_steps:
            self.add_callback(_LeaveModel(self))

    @property
    def in_warmup(self) -> bool:
        """True while the heads of a joint run learn alone."""
        joint = isinstance(self.objective, Joint)
        return joint and self.state.global_step < self.objective.warmup_steps

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, Tensor]:
        """Fetch the batches of one optimizer step, and count the targets at each offset."""
        batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._totals = self._count_targets([row for batch in batches for row in batch], device)
        if self.args.world_size > 1:
            dist.all_reduce(self._totals)
        self._count = count
        return batches, count

    def _count_targets(self, examples: Sequence[dict], device: torch.device) -> Tensor:
        counts = [
            sum(count_ahead(example["trained"], offset) for example in examples)
            for offset in self._offsets
        ]
        (uploaded,) = upload([counts], dtype=torch.float32, device=torch.device(device))
        return uploaded

    def _evaluate_into_metrics(self, dataset: Dataset) -> None:
        kept = self._totals, self._count
        rows = dataset.select_columns(["trained"])
        self._totals = self._count_targets(rows, self.args.device)
        self._count = self._totals[0]
        try:
            super()._evaluate_into_metrics(dataset)
        finally:
            self._totals, self._count = kept

    def microbatch_loss(self, model: nn.Module, examples: Sequence[dict]) -> Tensor:
        """Compute the micro-batch's part of the loss, times the count that it is divided by."""
        segments = [
            Segment(example["input_ids"], scored=example["trained"], row=row)
            for row, example in enumerate(examples)
        ]
        batch = pack(segments, num_rows=len(examples), device=self.args.device)
        joint = self.objective if isinstance(self.objective, Joint) else None
        with_base = joint is not None and not (self.in_warmup and self.is_in_train)
        teacher = None
        if with_base and joint.distil:
            adapted = getattr(model, "module", model)
            with adapted.disable_adapter():
                teacher = trunk_states(adapted, batch)
        found = scores_ahead(
            model, batch, segments, with_base=with_base, detach=not with_base, teacher=teacher
        )
        self._note_scores(found, distilled=teacher is not None)
        heads = [scores.logps for scores in found.heads]
        if with_base:
            total = joint.loss(found.base.logps, heads, totals=self._totals)
        else:
            alone = joint.alone if joint else self.objective
            total = alone(heads, totals=self._totals[1:])
        if joint and not with_base and self.args.world_size > 1 and torch.is_grad_enabled():
            # DDP waits for a gradient of every weight that will train later.
            total = total + sum(0 * weight.sum() for weight in self.model_weights())
        return total * self._count

    def model_weights(self) -> list[Tensor]:
        """List the trained weights of the model without its heads."""
        theirs = {id(weight) for weight in heads_of(self.model).parameters()}
        return [w for w in self.model.parameters() if w.requires_grad and id(w) not in theirs]

    def _note_scores(self, found: ScoresAhead, *, distilled: bool) -> None:
        if found.base is not None:
            if distilled:
                self.note(teacher_kl=-found.base.logps, teacher_agreement=found.base.is_argmax)
            else:
                self.note(token_accuracy=found.base.is_argmax, entropy=found.base.entropy)
        for offset, scores in zip(self._offsets[1:], found.heads, strict=True):
            self.note(**{f"accuracy_ahead_{offset}": scores.is_argmax})

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Make one optimizer, with the heads' parameters in groups that have their own rate."""
        if self.optimizer is not None:
            return self.optimizer
        optimizer = super().create_optimizer(model)
        theirs = {id(parameter) for parameter in heads_of(self.model).parameters()}
        rate = self.head_learning_rate or self.args.learning_rate
        for group in list(optimizer.param_groups):
            of_heads = [p for p in group["params"] if id(p) in theirs]
            if of_heads:
                group["params"] = [p for p in group["params"] if id(p) not in theirs]
                optimizer.add_param_group({**group, "params": of_heads, "lr": rate})
        return optimizer

    # Saving: the model as it would be without heads, and the heads beside it.

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        with without_heads(self.model):
            super()._save(output_dir, state_dict)
        if self.args.should_save:
            save_heads(self.model, output_dir or self.args.output_dir)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        with without_heads(self.model):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        restore_heads(self.model, resume_from_checkpoint)


class _LeaveModel(TrainerCallback):
    """Takes the gradients of 0 from the model in the warm-up: the optimizer passes it over.

    With a gradient, even of 0, Adam would count its steps from the start.
    """

    def __init__(self, trainer: HeadsTrainer) -> None:
        self.trainer = trainer

    def on_pre_optimizer_step(self, *_: object, **__: object) -> None:
        """Drop them before the step."""
        if self.trainer.in_warmup:
            for weight in self.trainer.model_weights():
                weight.grad = None
