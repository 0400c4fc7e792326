"""The KL guard bounds each step; the reference follows the policy, also over a resume."""

from functools import partial

import pytest
import torch

from posttrain.errors import ConfigError
from posttrain.packed.forward import packed_logps
from posttrain.run.checkpoints import CheckpointCallback
from posttrain.trainers.callbacks import MAX_HALVINGS, KLGuard, ReferenceSync
from tests.conftest import make_model
from tests.trainers.tiny import logged, make_trainer, weights

rl_trainer = partial(make_trainer, "rl")
MAX_KL = 0.01


def test_a_step_within_the_bound_is_left_alone(tmp_path):
    free = rl_trainer(tmp_path / "free")
    guarded = rl_trainer(tmp_path / "guarded", trainer={"callbacks": [KLGuard(100.0)]})
    for trainer in (free, guarded):
        trainer.train()
    assert torch.equal(weights(free.model), weights(guarded.model))
    assert logged(guarded, "step_share") == [1.0] * 3
    assert min(logged(guarded, "step_kl")) > MAX_KL  # so the bound below bites


def test_a_step_past_the_bound_is_halved_until_it_fits(tmp_path):
    """The weights lie on the way of the free step, and the next longer step would not have fit."""
    start = weights(make_model())
    free = rl_trainer(tmp_path / "free", max_steps=1)
    guarded = rl_trainer(
        tmp_path / "guarded", max_steps=1, trainer={"callbacks": [KLGuard(MAX_KL)]}
    )
    looser = rl_trainer(tmp_path / "looser", max_steps=1, trainer={"callbacks": [KLGuard(1e9)]})
    for trainer in (free, guarded, looser):
        trainer.train()
    (share,), (kl,) = logged(guarded, "step_share"), logged(guarded, "step_kl")
    assert share in [0.5**k for k in range(1, MAX_HALVINGS + 1)]
    assert 0 < kl <= MAX_KL < logged(looser, "step_kl")[0]
    moved = weights(guarded.model) - start
    assert torch.allclose(moved, share * (weights(free.model) - start), atol=1e-7)
    # Twice as far is past the bound: it was not halved in vain.
    model = make_model()
    torch.nn.utils.vector_to_parameters(start + 2 * moved, model.parameters())
    guarded.model.load_state_dict(model.state_dict(), strict=False)
    (guard,) = (c for c in guarded.callback_handler.callbacks if isinstance(c, KLGuard))
    assert guard._kl() > MAX_KL


def test_the_kl_is_that_of_the_tokens_before_and_after(tmp_path):
    """k3 by hand from log-probs of the two weights: mean of exp(d) - 1 - d, d = after - before."""
    guard = KLGuard(1e9)
    trainer = rl_trainer(tmp_path, max_steps=1, trainer={"callbacks": [guard]})
    trainer.train()
    (recorded,) = trainer.step_batches
    batch = recorded.batch
    before = rl_trainer(tmp_path / "again").model
    with torch.no_grad():
        d = packed_logps(trainer.model, batch).logps - packed_logps(before, batch).logps
    assert logged(trainer, "step_kl")[0] == pytest.approx((d.exp() - 1 - d).mean().item(), rel=1e-3)


def test_a_step_that_no_halving_makes_fit_is_undone(tmp_path):
    trainer = rl_trainer(tmp_path, max_steps=2, trainer={"callbacks": [KLGuard(1e-12)]})
    trainer.train()
    assert torch.equal(weights(trainer.model), weights(make_model()))
    assert logged(trainer, "step_share") == [0.0, 0.0]


def reference_weights(trainer):
    return weights(trainer.reference)


def test_the_reference_becomes_the_policy_every_so_many_steps(tmp_path):
    trainer = rl_trainer(
        tmp_path, max_steps=4, trainer={"beta": 0.1, "callbacks": [ReferenceSync(2)]}
    )
    trainer.train()
    assert torch.equal(reference_weights(trainer), weights(trainer.model))
    kl = logged(trainer, "kl")
    assert kl[0] < 1e-6 > kl[2]  # the first steps after the start and after the sync
    assert kl[1] > 1e-4 < kl[3]


def test_a_resumed_run_has_the_reference_of_the_whole_run(tmp_path):
    def run(folder, **changes):
        settings = {"beta": 0.1, "callbacks": [ReferenceSync(2), CheckpointCallback()]}
        trainer = rl_trainer(
            folder, max_steps=3, save_strategy="steps", save_steps=2, trainer=settings
        )
        trainer.train(**changes)
        return trainer

    whole = run(tmp_path / "whole")
    resumed = run(tmp_path / "resumed", resume_from_checkpoint=str(tmp_path / "whole/checkpoint-2"))
    assert torch.equal(weights(whole.model), weights(resumed.model))
    assert torch.equal(reference_weights(whole), reference_weights(resumed))
    assert not torch.equal(reference_weights(resumed), weights(make_model()))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"callbacks": [ReferenceSync(2)]}, "expected a separate reference"),
        ({"callbacks": [ReferenceSync(2)], "beta": 0.1}, "expected a multiple of reference_sync"),
    ],
)
def test_a_sync_that_cannot_work_is_refused(settings, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        rl_trainer(tmp_path, save_strategy="steps", save_steps=3, trainer=settings)


@pytest.mark.parametrize("wrong", [partial(KLGuard, 0.0), partial(ReferenceSync, 0)])
def test_settings_that_mean_nothing_are_refused(wrong):
    with pytest.raises(ConfigError, match="found 0"):
        wrong()
