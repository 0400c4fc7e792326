"""Preference optimisation on pairs: DPO and its family, each a function of the pair's log-probs.

The prompt of a pair is computed once for both answers. Reference log-probs are computed before
step 0 by the model that is about to train (posttrain.trainers.preference), and only if the loss
names them.

The reference is data: its log-probs are computed once, before the first step, and kept.

They come from the very model that is about to train, through the same packed forward. A resumed
run reads them back, since its model is no longer the reference.
"""

import functools
import hashlib
import inspect
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from posttrain.errors import ConfigError, DataError
from posttrain.packed.batch import pack_pairs
from posttrain.packed.forward import packed_logps
from posttrain.packed.prepare import check_context
from posttrain.run.console import is_main_process, say
from posttrain.run.ranks import rank_and_world
from posttrain.trainers.base import PackedTrainer, refuse_empty

# What a preference loss may ask for by name; (B,) each, log-probs in nats, lengths in tokens.
LOSS_INPUTS = (
    "chosen", "rejected", "ref_chosen", "ref_rejected", "chosen_lengths", "rejected_lengths",
)  # fmt: skip


class PreferenceTrainer(PackedTrainer):
    """Trains on pairs with `prompt_ids`, `chosen_ids`, `rejected_ids` (posttrain.data.load_pairs).

    loss: f(chosen, rejected[, ref_chosen, ref_rejected, chosen_lengths, rejected_lengths]) -> (B,)
    of posttrain.losses, with its hyper-parameters bound. It is given what its signature names. A
    loss that looks across pairs (aot) sees one micro-batch at a time.
    """

    def __init__(
        self,
        model: nn.Module,
        args: Any,
        *,
        pairs: Any,
        tokenizer: Any,
        loss: Callable[..., Tensor],
        eval_pairs: Any = None,
        **settings: Any,
    ) -> None:
        refuse_empty(pairs, "pair")
        lengths = zip(pairs["prompt_ids"], pairs["chosen_ids"], pairs["rejected_ids"], strict=True)
        longest = max(len(p) + max(len(c), len(r)) for p, c, r in lengths)
        check_context(model, longest, "Lower --max_length.")
        super().__init__(
            model, args, tokenizer=tokenizer, train_dataset=_Pairs(pairs),
            eval_dataset=None if eval_pairs is None else _Pairs(eval_pairs), **settings,
        )  # fmt: skip
        self.loss = loss
        self.loss_inputs = _inputs_of(loss)
        self._resuming = False

    @property
    def needs_reference(self) -> bool:
        """Whether the loss compares with a reference (SimPO, CPO and ORPO do not)."""
        return "ref_chosen" in self.loss_inputs

    def train(self, resume_from_checkpoint: Any = None, **arguments: Any) -> Any:
        self._resuming = bool(resume_from_checkpoint)
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **arguments)

    def _prepare_for_training(self, *arguments: Any, **settings: Any) -> Any:
        # Here the model is wrapped for its engine and has not taken a step.
        prepared = super()._prepare_for_training(*arguments, **settings)
        if self.needs_reference:
            for pairs in filter(None, (self.train_dataset, self.eval_dataset)):
                self._find_reference(pairs, prepared[0])
        return prepared

    def _find_reference(self, pairs: "_Pairs", model: nn.Module) -> None:
        if pairs.reference is not None:
            return
        name = FILE_NAME if pairs is self.train_dataset else f"eval_{FILE_NAME}"
        path = Path(self.args.output_dir) / name
        if self._resuming:
            pairs.reference = load_reference(path, pairs)
            return
        model.eval()
        pairs.reference = compute_reference(
            functools.partial(self._score, model),
            pairs,
            batch_size=max(1, self.args.per_device_train_batch_size),
            device=self.args.device,
        ).cpu()
        save_reference(path, pairs.reference, pairs)

    def _score(self, model: nn.Module, pairs: list[dict]) -> Tensor:
        """(B, 2) summed log-probs of chosen and rejected, micro-batch by micro-batch."""
        for part in self._microbatches(pairs):
            logps = self._sums(model, part or pairs[:1])[0].reshape(-1, 2)
            for pair, scored in zip(part, logps, strict=False):  # an empty part scores a stand-in
                pair["reference"] = scored
        return torch.stack([pair["reference"] for pair in pairs])

    def _evaluate_into_metrics(self, dataset: Any) -> None:
        pairs = dataset if isinstance(dataset, _Pairs) else _Pairs(dataset)
        if self.needs_reference and pairs.reference is None:
            if self.state.global_step:
                raise DataError(
                    "evaluate: the reference log-probs of these pairs are not known, and the model "
                    "is no longer the reference. Pass them as eval_pairs before training."
                )
            self._find_reference(pairs, self.model_wrapped)
        super()._evaluate_into_metrics(pairs)

    def num_tokens(self, example: dict) -> int:
        return sum(len(example[key]) for key in ("prompt_ids", "chosen_ids", "rejected_ids"))

    def count_items(self, examples: Sequence[dict]) -> int:
        return len(examples)

    def _sums(self, model: nn.Module, examples: Sequence[dict]) -> tuple[Tensor, Tensor]:
        """(2B,) summed log-probs and lengths: chosen, rejected, chosen, rejected …"""
        batch = pack_pairs(examples, device=self.args.device)
        logps = batch.dense(packed_logps(model, batch).logps).sum(1)
        return logps, batch.mask().sum(1)

    def microbatch_loss(self, model: nn.Module, examples: Sequence[dict]) -> Tensor:
        logps, lengths = self._sums(model, examples)
        inputs = {
            "chosen": logps[0::2], "rejected": logps[1::2],
            "chosen_lengths": lengths[0::2], "rejected_lengths": lengths[1::2],
        }  # fmt: skip
        margin = inputs["chosen"] - inputs["rejected"]
        if self.needs_reference:
            reference = torch.tensor([pair["reference"] for pair in examples], device=logps.device)
            inputs["ref_chosen"], inputs["ref_rejected"] = reference.to(logps.dtype).unbind(1)
            margin = margin - (inputs["ref_chosen"] - inputs["ref_rejected"])
            self._note(chosen_log_ratio=inputs["chosen"] - inputs["ref_chosen"])
            self._note(rejected_log_ratio=inputs["rejected"] - inputs["ref_rejected"])
        self._note(
            pair_accuracy=(margin > 0).float(), margin=margin,
            chosen_logps=inputs["chosen"], rejected_logps=inputs["rejected"],
            chosen_tokens=inputs["chosen_lengths"], rejected_tokens=inputs["rejected_lengths"],
        )  # fmt: skip
        return self.loss(**{name: inputs[name] for name in self.loss_inputs}).sum()

    def _note(self, **per_pair: Tensor) -> None:
        for name, values in per_pair.items():
            self.metrics.add(name, values.sum(), len(values))


def _inputs_of(loss: Callable[..., Tensor]) -> list[str]:
    """The tensors that a loss asks for; ConfigError if it asks for something nobody has."""
    parameters = inspect.signature(loss).parameters.values()
    names = [p.name for p in parameters if p.name in LOSS_INPUTS]
    unknown = [
        p.name
        for p in parameters
        if p.name not in LOSS_INPUTS and p.default is p.empty and p.kind is not p.VAR_KEYWORD
    ]
    if unknown or not {"chosen", "rejected"} <= set(names):
        raise ConfigError(
            f"loss {getattr(loss, '__name__', loss)}: expected arguments among "
            f"{', '.join(LOSS_INPUTS)}, others bound with functools.partial; "
            f"found {', '.join(p.name for p in parameters)}."
        )
    return names


class _Pairs(torch.utils.data.Dataset):
    """Pairs with their reference log-probs beside them, once these are known."""

    def __init__(self, pairs: Any) -> None:
        self.pairs = pairs
        self.reference: Tensor | None = None

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict:
        pair = dict(self.pairs[index])
        if self.reference is not None:
            pair["reference"] = self.reference[index].tolist()
        return pair


FILE_NAME = "reference.safetensors"


def fingerprint(pairs: Any) -> str:
    """SHA-256 over the token ids of all pairs: what cached log-probs belong to."""
    digest = hashlib.sha256()
    for pair in pairs:
        for column in ("prompt_ids", "chosen_ids", "rejected_ids"):
            digest.update(torch.tensor([len(pair[column]), *pair[column]]).numpy().tobytes())
    return digest.hexdigest()


def save_reference(path: Path, logps: Tensor, pairs: Any) -> None:
    """Write (pairs, 2) log-probs and the fingerprint of their data, whole or not at all."""
    if is_main_process():
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        save_file({"logps": logps.cpu()}, part, metadata={"pairs": fingerprint(pairs)})
        part.replace(path)


def load_reference(path: Path, pairs: Any) -> Tensor:
    """(pairs, 2) log-probs of chosen and rejected. DataError if missing or made of other data."""
    from safetensors import safe_open

    if not path.is_file():
        raise DataError(
            f"{path} is missing: a resumed run needs the reference log-probs of its first start. "
            "Start the run anew without --resume."
        )
    with safe_open(path, framework="pt") as file:
        made_for = file.metadata()["pairs"]
    if made_for != fingerprint(pairs):
        raise DataError(
            f"{path} was made for other data than this run's {len(pairs)} pairs. "
            "Resume with the data, template and lengths that the run was started with."
        )
    return load_file(path)["logps"]


@torch.no_grad()
def compute_reference(
    score: Callable[[Sequence[dict]], Tensor], pairs: Any, *, batch_size: int, device: torch.device
) -> Tensor:
    """(pairs, 2) log-probs of all pairs, each rank scoring its share.

    score: f(examples) -> (len(examples), 2), a collective under ZeRO-3, so that every rank calls
    it equally often.
    """
    rank, world = rank_and_world()
    logps = torch.zeros(len(pairs), 2, device=device)
    num_batches = math.ceil(len(pairs) / (batch_size * world))
    say(f"        reference log-probs of {len(pairs):,} pairs, once, before the first step")
    for index in range(num_batches):
        start = (index * world + rank) * batch_size
        rows = list(range(start, min(start + batch_size, len(pairs))))
        scored = score([pairs[i] for i in rows or [0]])
        if rows:
            logps[rows] = scored.to(logps.dtype)
    if world > 1:
        dist.all_reduce(logps)  # each row is zero on every rank but one
    return logps
