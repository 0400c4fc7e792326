"""A whole optimizer step on a device: no host tensors in it, and hardly a wait for the device.

The device is played by tests/fakes/device.py. The step has two accumulation steps of several
micro-batches, and no log line: metrics are read once per line.
"""

import pytest
import torch
from transformers import TrainerCallback

from posttrain.losses import bradley_terry_loss, cpo_loss, dft_loss, dpo_loss, nll_loss
from tests.conftest import TINY, make_tokenizer
from tests.fakes.device import FakeCuda
from tests.trainers import tiny
from tests.trainers.tiny import arguments, make_trainer

SMALL = 64  # packed tokens: several micro-batches in each accumulation step
STEP = {
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "max_steps": 1,
    "logging_strategy": "no",
    "optim": "sgd",
}


class WholeStep(TrainerCallback):
    """The waits for the device between the first batch and the end of the optimizer step."""

    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda = cuda
        self.waits: list = []
        self._start = 0

    def on_step_begin(self, *_, **__):
        self._start = len(self.cuda.syncs)

    def on_step_end(self, *_, **__):
        self.waits = self.cuda.syncs[self._start :]


def reward_trainer(folder, *, callbacks, **settings):
    from transformers import AutoConfig, AutoModelForSequenceClassification

    from posttrain.trainers.reward import RewardTrainer

    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", **{**TINY, "num_labels": 1})
    pairs = tiny.pairs()
    return RewardTrainer(
        AutoModelForSequenceClassification.from_config(config),
        arguments(folder, **settings),
        pairs=pairs.add_column("margin", [0.1] * len(pairs)),
        tokenizer=make_tokenizer(),
        loss=bradley_terry_loss,
        max_tokens_per_microbatch=SMALL,
        callbacks=callbacks,
    )


def trainer_with(kind, loss):
    def make(folder, *, callbacks, **settings):
        own = {"loss": loss, "max_tokens_per_microbatch": SMALL, "callbacks": callbacks}
        return make_trainer(kind, folder, trainer=own, **settings)

    return make


TRAINERS = {
    "sft": trainer_with("sft", nll_loss),
    "dft": trainer_with("sft", dft_loss),
    "dpo": trainer_with("dpo", dpo_loss),
    "cpo": trainer_with("dpo", cpo_loss),
    "reward model": reward_trainer,
}


@pytest.mark.parametrize("name", TRAINERS)
def test_a_step_mixes_no_devices_and_waits_at_most_twice(name, tmp_path):
    with FakeCuda() as cuda:
        step = WholeStep(cuda)
        trainer = TRAINERS[name](tmp_path, callbacks=[step], **STEP)
        trainer.train()
        assert trainer.state.global_step == 1
        assert len(step.waits) <= 2, "\n".join(map(str, step.waits))


@pytest.mark.parametrize("name", TRAINERS)
def test_what_our_code_uploads_in_training_is_pinned(name, tmp_path):
    with FakeCuda() as cuda:
        trainer = TRAINERS[name](tmp_path, callbacks=[], **STEP)
        before = len(cuda.uploads)
        trainer.train()
        ours = [e for e in cuda.uploads[before:] if e.site.startswith("posttrain/")]
        assert ours
        assert [str(event) for event in ours if not event.pinned] == []


def test_a_loss_that_reads_the_device_would_be_found(tmp_path):
    """The negative control: one `.item()` per micro-batch."""

    def reading(chosen, rejected):
        return (chosen - rejected) * float(chosen.mean().item() > 0)

    with FakeCuda() as cuda:
        step = WholeStep(cuda)
        trainer_with("dpo", reading)(tmp_path, callbacks=[step], **STEP).train()
        assert len(step.waits) > 2
