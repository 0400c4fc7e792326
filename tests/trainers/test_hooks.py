"""The private parts of transformers and accelerate that we rely on are what we take them for.

A hook that a new version renames would not fail: our override would simply never run, and with it
the guard against NaN, the reference pass or the critic of a checkpoint. pyproject.toml therefore
pins transformers and accelerate to the tested minor version, and these tests are what to run first
with another one.
"""

import ast
import inspect
from pathlib import Path

import pytest
import torch
from accelerate.state import GradientState
from packaging.specifiers import SpecifierSet
from transformers import Trainer

from posttrain.run.engine import one_pass
from posttrain.trainers.base import PackedTrainer
from tests.trainers.tiny import arguments, logged, make_trainer, weights

ROOT = Path(__file__).parents[2]

# Methods of transformers.Trainer that we override or call, and their parameters as we rely on them.
HOOKS = {
    "_get_grad_norm": ["model", "grad_norm"],
    "_get_output_dir": ["trial"],
    "_init_training_state": [
        "max_steps",
        "num_update_steps_per_epoch",
        "num_train_epochs",
        "resume_from_checkpoint",
        "trial",
    ],
    "_load_from_checkpoint": ["resume_from_checkpoint", "model"],
    "_prepare_for_training": ["max_steps", "train_dataloader", "resume_from_checkpoint"],
    "_run_epoch": [
        "model",
        "epoch",
        "train_dataloader",
        "steps_in_epoch",
        "num_update_steps_per_epoch",
        "trial",
        "ignore_keys_for_eval",
        "start_time",
        "resume_from_checkpoint",
        "epochs_trained",
        "steps_trained_in_current_epoch",
    ],
    "_save": ["output_dir", "state_dict"],
    "_save_checkpoint": ["model", "trial"],
    "create_optimizer": ["model"],
    "evaluate": ["eval_dataset", "ignore_keys", "metric_key_prefix"],
    "floating_point_ops": ["inputs"],
    "get_batch_samples": ["epoch_iterator", "num_batches", "device"],
    "get_train_dataloader": [],
    "log": ["logs", "start_time"],
    "train": ["resume_from_checkpoint", "trial", "ignore_keys_for_eval"],
    "training_step": ["model", "inputs", "num_items_in_batch"],
}
NOT_IN_THIS_RUN = {"evaluate"}  # has no evaluation data
REPLACED = {"floating_point_ops", "get_batch_samples", "training_step"}  # ours, without super()


def private_names_used() -> set[str]:
    """Names of Trainer that a class of posttrain/trainers defines or reaches through self."""
    names = set()
    for path in (ROOT / "posttrain" / "trainers").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                names.add(node.name)
            elif isinstance(node, ast.Attribute):
                names.add(node.attr)
    return {
        n for n in names if n.startswith("_") and not n.startswith("__") and hasattr(Trainer, n)
    }


def test_every_private_method_that_our_trainers_use_is_named_here():
    assert private_names_used() <= set(HOOKS)


@pytest.mark.parametrize("name", HOOKS)
def test_a_hook_exists_with_the_parameters_that_we_rely_on(name):
    assert list(inspect.signature(getattr(Trainer, name)).parameters) == ["self", *HOOKS[name]]


def test_training_saving_and_resuming_call_every_hook(tmp_path, monkeypatch):
    calls: list[str] = []
    for name in HOOKS:
        owner = PackedTrainer if name in REPLACED else Trainer
        plain = getattr(owner, name)

        def spy(self, *args, name=name, plain=plain, **settings):
            calls.append(name)
            return plain(self, *args, **settings)

        monkeypatch.setattr(owner, name, spy)
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    make_trainer("sft", tmp_path, **settings).train()
    for name in ("_get_grad_norm", "get_batch_samples", "training_step", "log"):
        assert calls.count(name) >= 2, name  # once a step
    assert "_load_from_checkpoint" not in calls
    trainer = make_trainer("sft", tmp_path, **{**settings, "max_steps": 3})
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert set(HOOKS) - set(calls) == NOT_IN_THIS_RUN


def test_a_step_is_checked_after_its_backward_and_before_its_optimizer_step(tmp_path):
    """The order that the guard against NaN relies on."""
    trainer, order = make_trainer("sft", tmp_path, max_steps=1), []
    before = weights(trainer.model).clone()
    plain = trainer._get_grad_norm

    def check(model, grad_norm=None):
        has_gradient = model.lm_head.weight.grad is not None
        unchanged = torch.equal(weights(trainer.model), before)
        order.append((has_gradient, unchanged))
        return plain(model, grad_norm=grad_norm)

    trainer._get_grad_norm = check
    trainer.train()
    assert order == [(True, True)]
    assert not torch.equal(weights(trainer.model), before)
    assert len(logged(trainer, "grad_norm")) == 1


def test_the_number_of_gpus_can_be_set_so_that_nothing_is_wrapped_in_data_parallel(tmp_path):
    args = arguments(tmp_path)
    args._n_gpu = 4
    assert args.n_gpu == 4
    trainer = make_trainer("sft", tmp_path)
    trainer.args._n_gpu = 4
    PackedTrainer.__init__(
        trainer, trainer.model, trainer.args, tokenizer=None, train_dataset=trainer.train_dataset
    )
    assert trainer.args.n_gpu == 1


def test_gradient_synchronisation_is_set_through_the_state_that_accelerate_reads(tmp_path):
    assert list(inspect.signature(GradientState._set_sync_gradients).parameters) == [
        "self",
        "sync_gradients",
    ]
    accelerator = make_trainer("sft", tmp_path).accelerator
    accelerator.gradient_state._set_sync_gradients(True)
    with one_pass(accelerator, torch.nn.Linear(1, 1), last=False):
        assert accelerator.sync_gradients is False
    assert accelerator.sync_gradients is True


def test_deepspeeds_backward_and_zero_3s_hooks_are_where_we_reach_for_them():
    pytest.importorskip("deepspeed")
    from deepspeed.runtime import engine
    from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload

    assert "def backward(self, loss, retain_graph=False, scale_wrt_gas=True)" in inspect.getsource(
        engine
    )
    source = inspect.getsource(DeepSpeedZeRoOffload)
    for name in ("_register_deepspeed_module", "forward_hooks", "backward_hooks"):
        assert f"self.{name}" in source


@pytest.mark.parametrize(("package", "tested"), [("transformers", "5.23"), ("accelerate", "1.15")])
def test_the_pin_admits_the_tested_minor_version_and_no_later_one(package, tested):
    text = (ROOT / "pyproject.toml").read_text()
    (line,) = [line for line in text.splitlines() if line.strip().startswith(f'"{package}>')]
    specifiers = SpecifierSet(line.strip().strip('",').removeprefix(package))
    major, minor = map(int, tested.split("."))
    assert f"{tested}.0" in specifiers
    assert f"{major}.{minor + 1}.0" not in specifiers
    assert f"\n{package}=={tested}." in f"\n{(ROOT / 'constraints.txt').read_text()}"
