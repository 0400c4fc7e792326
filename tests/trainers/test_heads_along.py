"""Heads that learn along with a policy: it stays the same to the bit, and they resume exactly."""

import pytest
import torch

from posttrain.errors import ConfigError
from posttrain.heads import MTPModules, load_heads, save_heads
from posttrain.heads.ahead import tokens_ahead
from posttrain.packed.batch import Segment, pack
from posttrain.packed.prepare import prepare
from posttrain.rollouts.draft_length import Unlimited
from posttrain.rollouts.options import lookahead_of
from posttrain.trainers.callbacks import KLGuard
from posttrain.trainers.heads_along import HeadsAlong, ahead_in
from tests.conftest import make_model
from tests.trainers.tiny import arguments, logged, rl_trainer, weights


def trainer_of(folder, *, along=True, guard=False, lookahead=None, **args):
    callbacks = [HeadsAlong("no folder")] if along else []
    if along and lookahead:
        lookahead = lookahead_of(lookahead, callbacks[0].find)
        lookahead.controller = Unlimited()
    model = make_model(num_hidden_layers=2)
    guards = [KLGuard(1e-4)] if guard else []
    args = arguments(folder, max_steps=4, max_grad_norm=0.1, **args)
    return rl_trainer(model, args, callbacks=[*guards, *callbacks], lookahead=lookahead)


def heads_in(trainer):
    (along,) = (c for c in trainer.callback_handler.callbacks if isinstance(c, HeadsAlong))
    return weights(along.heads)


@pytest.mark.parametrize("guard", [False, True], ids=["alone", "with KLGuard"])
def test_the_policy_is_the_same_to_the_bit_with_heads_and_without(guard, tmp_path):
    """Clipped gradients, and completions that the learning heads themselves have drafted."""
    plain = trainer_of(tmp_path, along=False, guard=guard)
    ahead = trainer_of(tmp_path, guard=guard, lookahead="heads")
    before = heads_in(ahead)
    plain.train()
    ahead.train()
    assert torch.equal(weights(plain.model), weights(ahead.model))
    assert logged(plain, "grad_norm") == logged(ahead, "grad_norm")
    assert not torch.equal(heads_in(ahead), before)
    assert logged(ahead, "lookahead_tokens_per_step")[-1] >= 1
    assert 0 <= logged(ahead, "accuracy_ahead_2")[-1] <= 1


def test_heads_go_on_exactly_where_a_run_was_stopped_and_lie_beside_the_model(tmp_path):
    whole = trainer_of(tmp_path / "whole", save_strategy="steps", save_steps=2)
    whole.train()
    resumed = trainer_of(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert torch.equal(weights(whole.model), weights(resumed.model))
    assert torch.equal(heads_in(whole), heads_in(resumed))
    resumed.save_model(str(tmp_path / "model"))
    assert torch.equal(weights(load_heads(tmp_path / "model", whole.model).module), heads_in(whole))
    continued = HeadsAlong(str(tmp_path / "model"))
    assert continued.continues


def test_the_targets_are_those_of_the_segments():
    """Two completions of a prompt: no target crosses from one into the other."""
    segments = [
        Segment([5, 6, 7]),
        Segment([8, 9, 10, 11], parent=0, scored=[True] * 4, row=0),
        Segment([12, 13], parent=0, scored=[True] * 2, row=1),
    ]
    batch = pack(segments, num_rows=2, device="cpu")
    ours = ahead_in(batch, 3)
    for found, expected in zip(ours, tokens_ahead(segments, (2, 3, 4), device="cpu"), strict=True):
        inside = expected.positions >= 2  # from the prompt's last state on
        pairs = zip(expected.positions[inside], expected.targets[inside], strict=True)
        assert sorted(zip(*map(torch.Tensor.tolist, found), strict=True)) == sorted(
            (int(position), int(target)) for position, target in pairs
        )
    assert [len(found.targets) for found in ours] == [4, 2, 1]


def test_heads_of_another_kind_are_refused(tmp_path):
    model = make_model(num_hidden_layers=2)
    prepare(model)
    save_heads(model, tmp_path, MTPModules.on(model, num_modules=1))
    with pytest.raises(ConfigError, match="train_heads: expected Medusa heads beside"):
        HeadsAlong(str(tmp_path))
