"""float16: dynamic loss scaling as a run does it, on a CPU by the very path of a GPU."""

import itertools
import shutil

import pytest
import torch

from posttrain.errors import ConfigError, NonFiniteLossError
from posttrain.run.engine import half_dtype
from tests.conftest import make_model
from tests.golden import load
from tests.trainers.tiny import KINDS, logged, make_trainer, weights

CASES = "mixed_precision"
FP16 = {"fp16": True, "lr_scheduler_type": "linear"}


def scaled(folder, *, overflows=(), interval=None, kind="sft", **settings):
    """A float16 trainer whose gradient overflows in these steps, from 1 on."""
    trainer = make_trainer(kind, folder, **{**FP16, **settings})
    if interval:
        trainer.accelerator.scaler.set_growth_interval(interval)
    weight = next(trainer.model.parameters())
    infinite = lambda grad: grad + torch.inf  # noqa: E731
    step = lambda: trainer.state.global_step + 1  # noqa: E731
    weight.register_hook(lambda grad: infinite(grad) if step() in overflows else grad)
    return trainer


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adamw_torch"])
def test_a_run_scales_skips_and_grows_as_the_golden_case(optim, tmp_path):
    """A fused optimizer skips by itself, without a word to accelerate."""
    case = load(CASES)["amp_dynamic_loss_scale"]
    infinite, stepped = case.found_inf.tolist(), case.expected("optimizer_stepped").tolist()
    overflows = [step for step, bad in enumerate(infinite, start=1) if bad]
    trainer = scaled(
        tmp_path, overflows=overflows, interval=case.interval, max_steps=len(infinite), optim=optim
    )
    assert trainer.accelerator.scaler.get_scale() == case.init
    seen, rates, step = [], [], trainer._get_grad_norm
    trainer._get_grad_norm = lambda *a, **k: (seen.append(weights(trainer.model)), step(*a, **k))[1]
    log = trainer.log
    trainer.log = lambda *a, **k: (rates.append(trainer.lr_scheduler.last_epoch),
                                   log(*a, **k))[1]  # fmt: skip
    trainer.train()
    seen.append(weights(trainer.model))
    moved = [not torch.equal(a, b) for a, b in itertools.pairwise(seen)]
    assert moved == stepped
    assert logged(trainer, "loss_scale") == case.expected("scale_after").tolist()
    assert logged(trainer, "skipped_steps") == [1.0 - taken for taken in stepped]
    taken = torch.tensor(stepped).cumsum(0).tolist()
    assert rates[: len(taken)] == taken  # the schedule's steps
    assert trainer.state.global_step == len(infinite)
    norms = torch.tensor(logged(trainer, "grad_norm"))
    assert norms.isfinite().tolist() == stepped


@pytest.mark.parametrize("kind", KINDS)
def test_every_trainer_follows_float32_and_its_norms_are_not_scaled(kind, tmp_path):
    runs = []
    for fp16 in (True, False):
        trainer = make_trainer(kind, tmp_path / str(fp16), fp16=fp16)
        trainer.train()
        runs.append([logged(trainer, name) for name in ("grad_norm", "loss")])
        assert bool(logged(trainer, "loss_scale")) == fp16
        assert {weight.dtype for weight in trainer.model.parameters()} == {torch.float32}
    assert runs[0][0][0] == pytest.approx(runs[1][0][0], rel=0.02)
    assert runs[0][0][0] != runs[1][0][0]  # it did compute in float16
    assert runs[0][1][0] == pytest.approx(runs[1][1][0], rel=0.05)


def test_gradients_are_clipped_after_they_are_unscaled(tmp_path):
    """Plain gradient descent moves the weights by rate times the largest norm."""
    trainer = scaled(tmp_path, optim="sgd", max_grad_norm=0.01, learning_rate=1.0, max_steps=1,
                     lr_scheduler_type="constant")  # fmt: skip
    before = weights(trainer.model)
    trainer.train()
    assert logged(trainer, "grad_norm")[0] > 0.1
    assert (weights(trainer.model) - before).norm().item() == pytest.approx(0.01, rel=1e-3)


def test_a_resumed_run_has_the_scale_and_the_steps_since_the_last_overflow(tmp_path):
    settings = {"overflows": (2,), "interval": 4, "max_steps": 8, "save_strategy": "steps",
                "save_steps": 4}  # fmt: skip
    whole = scaled(tmp_path / "whole", **settings)
    whole.train()
    shutil.rmtree(tmp_path / "whole" / "checkpoint-8")
    again = scaled(tmp_path / "whole", **settings)
    again.train(resume_from_checkpoint=True)
    assert logged(again, "loss_scale") == logged(whole, "loss_scale")
    assert logged(again, "loss_scale")[3:] == [2.0**15] * 2 + [2.0**16] * 3
    assert torch.equal(weights(again.model), weights(whole.model))
    assert again.accelerator.scaler.state_dict() == whole.accelerator.scaler.state_dict()


def test_a_gradient_that_no_scale_makes_finite_ends_the_run(tmp_path):
    trainer = scaled(tmp_path, overflows=range(1, 99), max_steps=30)
    before = weights(trainer.model)
    with pytest.raises(NonFiniteLossError, match="not finite at step 17, whatever"):
        trainer.train()
    assert torch.equal(weights(trainer.model), before)


def test_deepspeed_and_fsdp_are_refused_before_a_model_is_loaded():
    for engine in ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP"):
        with pytest.raises(ConfigError, match="--dtype float16: expected one process or DDP"):
            half_dtype("float16", {engine: "true"})


# The reasons for it, in numbers.


def test_a_small_gradient_survives_by_its_scale():
    case = load(CASES)["fp16_gradient_underflow"]
    scaler = torch.amp.GradScaler("cpu", init_scale=case.scale.item())
    weight = torch.zeros((), requires_grad=True)
    optimizer = torch.optim.SGD([weight])

    def backward(scale):
        weight.grad = None
        half = weight.half()  # its gradient comes back in float16
        (half.float() * case.grad.float() * scale).backward()
        return weight.grad.double()

    case.check_output(backward(1.0), "fp16")
    case.check_output(backward(scaler.scale(torch.ones(())).detach()), "fp16_scaled")
    scaler.unscale_(optimizer)
    case.check_output(weight.grad.double(), "unscaled")


def test_float32_weights_keep_updates_that_half_precision_loses():
    case = load(CASES)["bf16_master_weights"]
    master, half = case.w0.float(), case.w0.bfloat16()
    for _ in range(case.n):
        master, half = master + case.update.float(), half + case.update.bfloat16()
    case.check_output(half.double(), "pure_bf16")
    case.check_output(master.double(), "fp32_master")
    case.check_output(master.bfloat16().double(), "cast_to_bf16")


def test_the_limits_of_the_formats():
    case = load(CASES)["dtype_limits"]
    of = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
    kinds = {"max": "max", "min_normal": "smallest_normal", "eps": "eps"}
    for name in case.output_names() - {"fp16_min_subnormal"}:
        dtype, kind = name.split("_", 1)
        case.check_output(torch.tensor(getattr(torch.finfo(of[dtype]), kinds[kind])).double(), name)
    smallest = torch.tensor(2.0**-24, dtype=torch.float16)
    case.check_output(smallest.double(), "fp16_min_subnormal")
    assert smallest / 2 == 0


def test_python_users_get_the_same(tmp_path):
    """TrainingArguments(fp16=True) on a CPU: accelerate alone would go on in float32."""
    trainer = make_trainer("sft", tmp_path, fp16=True, model=make_model(), max_steps=1)
    assert trainer.accelerator.native_amp
    kinds = []
    head = trainer.model.get_output_embeddings()
    head.register_forward_pre_hook(lambda _m, _i: kinds.append(torch.get_autocast_dtype("cpu")))
    trainer.train()
    assert set(kinds) == {torch.float16}
