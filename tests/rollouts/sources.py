"""A stand-in for the trainer that a source of rollouts is bound to, and its batches."""

from itertools import count, islice
from types import SimpleNamespace

import torch

from tests.conftest import make_tokenizer


class Notes(list):
    """Metrics as they are added: (name, total, count)."""

    def add(self, name, total, number=1):
        self.append((name, total, number))


def bind(source, *, prompts_per_batch=2, accumulation=2, seed=0, rank=0, world_size=1, epochs=1):
    """The source, started, as a trainer of this rank would have it; metrics go to `notes`."""
    args = SimpleNamespace(
        per_device_train_batch_size=prompts_per_batch * source.num_generations,
        gradient_accumulation_steps=accumulation,
        seed=seed,
        process_index=rank,
        world_size=world_size,
        logging_steps=1,
        device=torch.device("cpu"),
    )
    source.notes = Notes()
    trainer = SimpleNamespace(
        args=args, metrics=source.notes, state=SimpleNamespace(global_step=0), model=None,
        model_wrapped=None, accelerator=SimpleNamespace(unwrap_model=lambda model: model),
    )  # fmt: skip
    source.bind(trainer, make_tokenizer(), epochs=epochs)
    source.start(10**6)
    return source


def batches(source, *, first_rollout=0):
    """One accumulation step's groups after the other, for ever."""
    for number in count(first_rollout):
        yield from source.batches(source.groups(number), number)


def take(source, number, *, first_rollout=0):
    return list(islice(batches(source, first_rollout=first_rollout), number))
