"""FSDP2 on CPU ranks, for tests: accelerate drops it there, and so the product refuses it.

    allow_fsdp_on_cpu()        # in a rank, before its first trainer

torch's own `fully_shard` runs over gloo as it does over NCCL. Only two decisions stand between:
accelerate's, which keeps FSDP for kinds of devices that it names, and our refusal of what it drops.
"""

from __future__ import annotations

import os

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

from posttrain.run import engine


def allow_fsdp_on_cpu() -> None:
    """Make accelerate keep FSDP2 on CPU ranks of this process, and our check accept it."""
    start = AcceleratorState.__init__
    settle = engine.settle_use_cpu

    def start_with_fsdp(self, *arguments, fsdp_plugin=None, **settings):
        start(self, *arguments, fsdp_plugin=fsdp_plugin, **settings)
        if fsdp_plugin is not None:
            self.distributed_type = DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    def settle_without_fsdp(environment=os.environ):
        return settle({k: v for k, v in environment.items() if k != "ACCELERATE_USE_FSDP"})

    AcceleratorState.__init__ = start_with_fsdp
    engine.settle_use_cpu = settle_without_fsdp
