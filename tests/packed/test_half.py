"""Half precision: weights that are held in it give the same results, and lose nothing."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from posttrain.packed.batch import pack_groups
from posttrain.packed.forward import frozen_copy, packed_logps
from posttrain.packed.half import hold_in_half, keeping_casts, product, restoring_half
from posttrain.packed.prepare import prepare
from posttrain.packed.scalar import prepare_scalar
from tests.conftest import make_model
from tests.packed.test_scalar import make_classifier

BATCH = ([[5, 6], [7]], [[[8, 1], [9, 10, 1]], [[11]]])


def prepared(**settings):
    model = make_model(**settings)
    prepare(model)
    return model


@torch.no_grad()
def logps(model):
    batch = pack_groups(*BATCH, device="cpu")
    with torch.autocast("cpu", torch.bfloat16):
        return packed_logps(model, batch).logps


@pytest.mark.parametrize("tied", [False, True])
def test_a_reference_held_in_half_gives_the_same_log_probs_to_the_bit(tied):
    """Autocast would cast those weights in every forward; embeddings and norms stay float32."""
    model = prepared(tie_word_embeddings=tied)
    reference = frozen_copy(model, torch.device("cpu"), half=torch.bfloat16)
    assert torch.equal(logps(reference), logps(model))
    kinds = {name: p.dtype for name, p in reference.named_parameters()}
    rounded = {name for name, dtype in kinds.items() if dtype == torch.bfloat16}
    wanted = {name for name in kinds if "proj" in name or (not tied and "lm_head" in name)}
    assert rounded == wanted
    assert {p.dtype for p in model.parameters()} == {torch.float32}  # the policy itself


def test_what_trains_and_scalar_heads_stay_float32():
    model = make_classifier(num_hidden_layers=2)
    prepare_scalar(model)
    trained = model.model.layers[0].mlp.up_proj.weight
    model.requires_grad_(False)
    trained.requires_grad_()
    hold_in_half(model, torch.bfloat16)
    assert trained.dtype == model.score.weight.dtype == torch.float32
    assert model.model.layers[1].mlp.up_proj.weight.dtype == torch.bfloat16


def test_an_adapter_that_is_merged_and_taken_out_again_leaves_no_trace():
    """Ten rollouts: W + 0.1 - 0.1 in bfloat16 is another number than W."""
    model = torch.nn.Linear(64, 64, dtype=torch.bfloat16).requires_grad_(False)
    before = model.weight.clone()

    def merge_and_unmerge():
        model.weight += 0.1
        model.weight -= 0.1

    for _rollout in range(10):
        with restoring_half(model):
            merge_and_unmerge()
    assert torch.equal(model.weight, before)
    merge_and_unmerge()
    assert not torch.equal(model.weight, before)


class CountCasts(TorchDispatchMode):
    """Counts casts of matrices from float32 to bfloat16."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        if operator is torch.ops.aten._to_copy.default and args[0].dtype == torch.float32:
            self.count += result.dtype == torch.bfloat16 and isinstance(args[0], torch.nn.Parameter)
        return result


@torch.no_grad()
def test_weights_are_cast_once_for_many_forwards():
    """accelerate opens an autocast context in every forward, and its casts end with it."""
    model = prepared()
    matrices = sum("proj" in name or "head" in name for name, _ in model.named_parameters())
    ids = torch.tensor([[5, 6, 7]])

    def forward():
        with torch.autocast("cpu", torch.bfloat16):
            return model(ids).logits

    with CountCasts() as casts:
        wanted = [forward() for _ in range(3)]
    assert casts.count == 3 * matrices
    with CountCasts() as casts, keeping_casts(torch.device("cpu")):
        found = [forward() for _ in range(3)]
    assert casts.count == matrices
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)


def test_casts_that_were_kept_are_not_found_by_a_training_forward():
    """Made without gradient, they would cut the weights off from the loss."""
    model = prepared()
    batch = pack_groups(*BATCH, device="cpu")
    with torch.autocast("cpu", torch.bfloat16):  # an outer context, which alone keeps the cache
        with torch.no_grad(), keeping_casts(torch.device("cpu")):
            packed_logps(model, batch)
        packed_logps(model, batch).logps.sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())


def test_a_product_of_half_precision_inputs_is_not_rounded():
    """1 + 2^-10 needs 11 bits, bfloat16 has 8."""
    left = torch.tensor([[1.0, 2**-10]], dtype=torch.bfloat16)
    right = torch.ones(2, 1, dtype=torch.bfloat16)
    assert product(left, right).item() == 1 + 2**-10
    assert (left @ right).item() == 1
