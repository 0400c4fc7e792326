"""What a training step must know of the engine under it: one process, DDP, DeepSpeed or FSDP2.

Every engine averages gradients over ranks, so a loss that is a sum over a global count must be
multiplied by the number of ranks. Under DeepSpeed `accelerator.backward` also takes the optimizer
step, and needs `scale_wrt_gas=False` to leave the loss undivided.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn


@contextmanager
def one_pass(accelerator: Accelerator, model: nn.Module, *, last: bool) -> Iterator[None]:
    """Surrounds one forward and its backward, of several that make up one `training_step`.

    All but the last only add to the gradients: DDP and FSDP2 do not reduce them (the forward must
    be inside too: DDP decides there), DeepSpeed does not step. `model` is the wrapped model.
    DeepSpeed and FSDP2 communicate in every pass, so all ranks must run the same number of them.
    """
    if last:
        yield
        return
    state = accelerator.gradient_state
    due = state.sync_gradients
    # DeepSpeed refuses its own no_sync from stage 2 on, and needs none below.
    is_deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
    state._set_sync_gradients(False)
    try:
        with nullcontext() if is_deepspeed else accelerator.no_sync(model):
            yield
    finally:
        state._set_sync_gradients(due)


@contextmanager
def whole_model(accelerator: Accelerator, model: nn.Module) -> Iterator[nn.Module]:
    """The bare model with every parameter in place, to generate with (under torch.no_grad).

    Ranks may run different numbers of forwards inside. Under ZeRO-3 the parameters are gathered on
    every rank (the whole model must fit there) and the hooks that would fetch and release them
    layer by layer are off; all ranks must enter and leave together. `model` is the wrapped model.
    """
    bare = accelerator.unwrap_model(model)
    offload = getattr(getattr(model, "optimizer", None), "parameter_offload", None)
    if offload is None:
        yield bare
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(bare.parameters())):
        for hook in offload.forward_hooks + offload.backward_hooks:
            hook.remove()
        offload.forward_hooks, offload.backward_hooks = [], []
        try:
            yield bare
        finally:
            offload._register_deepspeed_module(offload.module)
