"""The stand-in for CUDA notices what CUDA would refuse, and what it would wait for."""

import pytest
import torch

from posttrain.packed.batch import pack_groups
from posttrain.packed.forward import packed_logps
from posttrain.packed.prepare import prepare
from tests.conftest import make_model
from tests.fakes.device import FakeCuda, MixedDevices
from tests.trainers.tiny import make_trainer, weights

GROUPS = ([[5, 6], [7]], [[[8, 1], [9, 10, 1]], [[11]]])


def on_device(values=(1.0, -2.0, 3.0)):
    return torch.tensor(values).cuda()


def test_device_tensors_say_so_and_their_results_views_and_gradients_too():
    with FakeCuda() as cuda:
        leaf = on_device().requires_grad_()
        made = [torch.zeros(2, device=cuda.device), leaf.new_ones(2), torch.ones_like(leaf)]
        (leaf * 2).sum().backward()
        for tensor in (leaf, *made, leaf * 2, leaf[1:], leaf.grad, leaf.detach().clone()):
            assert tensor.device == cuda.device
            assert tensor.is_cuda
        for tensor in (torch.zeros(2), torch.tensor([1.0]), leaf.cpu(), leaf.to("cpu")):
            assert tensor.device.type == "cpu"
            assert not tensor.is_cuda


@pytest.mark.parametrize(
    "mix",
    [
        lambda x: x + torch.ones(3),
        lambda x: torch.cat((x, torch.ones(1))),
        lambda x: torch.stack((x.sum(), torch.tensor(1.0))),  # even a number, in a stack
        lambda x: torch.where(torch.tensor([True, False, True]), x, x),
        lambda x: x.index_put((torch.tensor([0]),), torch.ones(1)),
    ],
)
def test_mixed_devices_are_refused(mix):
    with FakeCuda(), pytest.raises(MixedDevices, match=r"test_device\.py:\d+ in <lambda>"):
        mix(on_device())


@pytest.mark.parametrize("mix", [lambda x: x * 2, lambda x: x * torch.tensor(2.0)])
def test_numbers_of_the_host_are_welcome(mix):
    with FakeCuda() as cuda:
        assert mix(on_device()).is_cuda
    assert cuda.syncs == []


def test_transforms_of_functions_are_seen_through():
    """torch.func wraps tensors in ones that have no memory of their own."""

    def square(x):
        assert x.is_cuda
        return (x * x + torch.zeros(3, device=x.device)).sum()

    with FakeCuda():
        assert torch.func.grad(square)(on_device()).cpu().tolist() == [2, -4, 6]
        with pytest.raises(MixedDevices):
            torch.func.grad(lambda x: (x * torch.ones(3)).sum())(on_device())


def test_a_mixture_in_a_backward_pass_is_refused():
    class Scale(torch.autograd.Function):
        @staticmethod
        def forward(_ctx, x):
            return x * 2

        @staticmethod
        def backward(_ctx, gradient):
            return gradient * torch.full((3,), 2.0)

    with FakeCuda():
        loss = Scale.apply(on_device().requires_grad_()).sum()
        with pytest.raises(MixedDevices, match="in backward"):
            loss.backward()


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: x.tolist(),
        lambda x: bool(x.sum()),
        lambda x: float(x.sum()),
        lambda x: int(x.sum()),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x.masked_select(x > 0),
        lambda x: x.cpu(),
        lambda x: x.to("cpu"),
        lambda x: torch.equal(x, x),
        lambda x: torch.zeros(3).copy_(x),
        lambda x: x.__setitem__(x > 0, x[:2] + 1),
    ],
)
def test_each_wait_for_the_device_is_counted_with_its_line(wait):
    with FakeCuda() as cuda:
        x = on_device()
        assert cuda.syncs == []
        wait(x)
    (event,) = cuda.syncs
    assert event.site.startswith("tests/fakes/test_device.py:")
    assert event.site.endswith("in <lambda>")


@pytest.mark.parametrize(
    "work",
    [
        lambda x: x.__setitem__(x > 0, 0.0),  # a masked_fill
        lambda x: torch.where(x > 0, x, 0.0),
        lambda x: x[torch.tensor([0, 2]).cuda()],
        lambda x: x.cumsum(0).softmax(0),
    ],
)
def test_work_that_stays_on_the_device_waits_for_nothing(work):
    with FakeCuda() as cuda:
        work(on_device())
    assert cuda.syncs == []


def test_tensors_of_the_host_may_be_read():
    with FakeCuda() as cuda:
        host = torch.tensor([1.0, 2.0])
        assert host.tolist() == [1, 2]
        assert host[host > 1].sum().item() == 2
    assert cuda.syncs == cuda.uploads == []


def test_uploads_are_counted_and_those_that_do_not_wait_are_told_apart():
    with FakeCuda() as cuda:
        torch.tensor([1.0], device=cuda.device)
        torch.ones(2).to(cuda.device)
        torch.ones(2).to(cuda.device, non_blocking=True)  # not pinned: it waits all the same
        torch.ones(2).pin_memory().to(cuda.device, non_blocking=True)
        torch.zeros(2, device=cuda.device)  # made there
    assert [event.pinned for event in cuda.uploads] == [False, False, False, True]


def test_a_packed_step_gives_the_same_numbers_waits_for_nothing_and_uploads_three_times():
    """Integers, floats, and the index tensors of attention."""
    model = make_model()
    prepare(model)
    packed_logps(model, pack_groups(*GROUPS, device="cpu")).logps.sum().backward()
    wanted = torch.cat([p.grad.flatten() for p in model.parameters()])
    model.zero_grad()
    with FakeCuda() as cuda:
        model.to(cuda.device)
        before = len(cuda.uploads)
        columns = {"old": [[1.0, 2.0], [1.0, 2.0, 3.0], [1.0]]}
        batch = pack_groups(*GROUPS, device=cuda.device, token_columns=columns)
        logps = batch.dense(packed_logps(model, batch).logps)
        ((logps - batch.column("old")) * batch.mask()).sum().backward()
        uploads = cuda.uploads[before:]
        assert len(uploads) == 3
        assert all(event.pinned for event in uploads)
        assert cuda.syncs == []
    found = torch.cat([p.grad.flatten() for p in model.parameters()])
    torch.testing.assert_close(found, wanted)


def test_a_whole_training_step_runs_there_and_gives_the_same_weights(tmp_path):
    plain = make_trainer("sft", tmp_path)
    plain.train()
    with FakeCuda() as cuda:
        trainer = make_trainer("sft", tmp_path)
        trainer.train()
        assert next(trainer.model.parameters()).is_cuda
    torch.testing.assert_close(weights(trainer.model), weights(plain.model))
    assert cuda.syncs_in("posttrain/packed") == []
    assert all(event.pinned for event in cuda.uploads_in("posttrain/packed"))
