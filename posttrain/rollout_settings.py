"""Settings of RL recipes that can draw answers with vLLM, or one rollout ahead.

class Config(RolloutConfig, RLConfig): …
trainer = RLTrainer(load_model(config), …, **rl_inputs(config, rewards),
                    **rollout_inputs(config, tis_weights))
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, Literal

from posttrain.config import option
from posttrain.console import say
from posttrain.errors import ConfigError

ENGINE_PACKAGES = ("trl", "vllm")
# Settings that have a part in one mode of vLLM only.
OF_MODE = {"vllm_gpu_memory_utilization": "colocate", "vllm_server_base_url": "server"}


@dataclass(kw_only=True)
class RolloutConfig:
    rollout: Literal["auto", "hf", "vllm"] = option(
        "auto", "who draws: vllm, or hf, the decode loop on the model; auto chooses and says so"
    )
    vllm_mode: Literal["colocate", "server"] = option(
        "colocate", "vLLM on each trainer's own GPU, or one server for all"
    )
    vllm_server_base_url: str = option("http://localhost:8000", "where that server listens")
    vllm_gpu_memory_utilization: float = option(
        0.3, "vLLM's share of the GPU's memory (colocate)", above=0, at_most=1
    )
    overlap_rollouts: bool = option(False, "draw the next answers while these train: one stale")

    def check(self) -> None:
        defaults = {field.name: field.default for field in fields(self)}
        for name in ("vllm_mode", *OF_MODE):
            if getattr(self, name) == defaults[name]:
                continue
            if self.rollout == "hf":
                raise ConfigError(f"{name}: expected --rollout vllm or auto with it, found hf.")
            if OF_MODE.get(name, self.vllm_mode) != self.vllm_mode:
                raise ConfigError(
                    f"{name}: expected --vllm_mode {OF_MODE[name]} with it, found {self.vllm_mode}."
                )
        if self.rollout == "vllm" and (missing := missing_packages()):
            raise ConfigError(
                f"rollout: expected the packages {' and '.join(ENGINE_PACKAGES)} for vllm, found "
                f"no {' and no '.join(missing)}. Install them with posttrain's extra, pip install "
                "'posttrain[vllm]', or take --rollout hf."
            )


def missing_packages() -> list[str]:
    """Those of `ENGINE_PACKAGES` that are not installed."""
    return [name for name in ENGINE_PACKAGES if importlib.util.find_spec(name) is None]


def rollout_inputs(
    config: Any, correction: Callable | None, *, where_needed: bool = True
) -> dict[str, Any]:
    """Who draws RLTrainer's answers, and the weights for the difference; says both in one line.

    config: a RolloutConfig and RLConfig. correction: those weights (posttrain.losses: tis_weights,
    …), or None; where_needed: not where the policy of the moment itself draws. Raises ConfigError
    where vLLM is asked for and there is no GPU, or no server.
    """
    who, engine = _choose(config)
    ahead = ", one rollout ahead" if config.overlap_rollouts else ""
    if where_needed and not (engine or ahead):
        correction = None
    name = correction.__name__ if correction else "none"
    say(f"rollout {who}{ahead}; correction of the probabilities: {name}")
    return {
        "engine": engine,
        "overlap_rollouts": config.overlap_rollouts,
        "correction": correction,
    }


def _choose(config: Any) -> tuple[str, Any]:
    """In words, and as RLTrainer's `engine`."""
    from posttrain.rollouts.vllm import check_server, start_vllm

    has_gpu, missing = _has_gpu(), missing_packages()
    if config.rollout == "vllm" and not has_gpu:
        raise ConfigError(
            "--rollout vllm: expected a CUDA GPU, found none. vLLM draws on it, or its server gets "
            "the weights from it. Take --rollout hf."
        )
    if config.rollout == "hf":
        return "by hf, the decode loop on the model", None
    if missing or not has_gpu:
        why = f"no {' and no '.join(missing)}" if missing else "no GPU"
        return f"by hf, the decode loop on the model ({why} here)", None
    settings = {"max_model_length": config.max_prompt_length + config.max_completion_length}
    if config.vllm_mode == "server":
        url = config.vllm_server_base_url.rstrip("/")
        check_server(url)
        settings |= {"mode": "server", "server_base_url": url}
        return f"by vllm, the server at {url}", partial(start_vllm, **settings)
    share = config.vllm_gpu_memory_utilization
    settings["gpu_memory_utilization"] = share
    return f"by vllm, on {share:.0%} of this GPU's memory", partial(start_vllm, **settings)


def _has_gpu() -> bool:
    from posttrain.models.device import this_device

    return this_device().type == "cuda"
