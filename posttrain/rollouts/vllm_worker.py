"""Loaded into the workers of a vLLM server that gets its weights through a folder.

    vllm serve MODEL --worker-extension-cls posttrain.rollouts.vllm_worker.Reloading

It imports nothing, so a server's environment needs no more than this file (pip install --no-deps).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn


class Reloading:
    """Adds a method to vLLM's worker class, for its endpoint /collective_rpc."""

    reload_weights: Any
    model_runner: Any

    def reload_from(self, folder: str) -> None:
        """Load the weights of a folder of safetensors."""
        self.reload_weights(weights_path=folder)
        refresh_heads(self.model_runner.model)


def refresh_heads(model: nn.Module) -> None:
    """Pack the weights of LM heads anew, where vLLM computes on a CPU.

    A head that shares the embedding's weight is no layer of its own to vLLM's reloading: it would
    go on with the copy that was packed at the start.
    """
    for module in model.modules():
        if type(module).__name__ == "ParallelLMHead" and hasattr(module, "cpu_linear"):
            module.quant_method.process_weights_after_loading(module)
