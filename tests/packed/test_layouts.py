import pytest
import torch

from posttrain.packed.half import laid_out_linears, multiplier
from tests.conftest import make_model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("rows", [0, 1, 33, 300])
def test_a_laid_out_weight_gives_the_products_in_float32_at_least(dtype, rows):
    draw = torch.Generator().manual_seed(rows)
    weight, left = (torch.randn(n, 24, generator=draw).to(dtype) for n in (40, rows))
    found = multiplier(weight)(left)
    wanted = left.double() @ weight.double().T
    assert found.dtype == torch.promote_types(dtype, torch.float32)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_linear_layers_are_laid_out_once_and_are_themselves_again_afterwards():
    model, ids = make_model(), torch.tensor([[5, 6, 7]])
    before = model(ids).logits
    with laid_out_linears(model):
        torch.testing.assert_close(model(ids).logits, before, rtol=1e-5, atol=1e-5)
        model.lm_head.weight += 1  # a copy is used
        torch.testing.assert_close(model(ids).logits, before, rtol=1e-5, atol=1e-5)
    assert (model(ids).logits - before).abs().max() > 0.1
    assert not any("forward" in vars(module) for module in model.modules())


@torch.no_grad()
def test_laid_out_layers_follow_autocast():
    layer, rows = torch.nn.Sequential(torch.nn.Linear(8, 16)), torch.randn(3, 8)
    with laid_out_linears(layer):
        full = layer(rows)
        with torch.autocast("cpu", torch.bfloat16):
            half = layer(rows)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(half, layer(rows))
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(full, layer(rows))
