"""What RLTrainer refuses before the first step, each with what to do about it."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from accelerate.utils import DistributedType
from torch import Tensor

from posttrain.errors import ConfigError
from posttrain.losses.kl import kl_k1
from posttrain.rewards.checks import find_unscorable
from posttrain.rollouts.group import DrawnGroup
from posttrain.rollouts.sampling import Completion, Sampling
from posttrain.rollouts.source import Selection, assign_advantages
from posttrain.run.console import say

LOSS_INPUTS = ("logps", "old_logps", "advantages", "mask")
UNITS = ("token", "sequence", "constant")  # "group" needs whole groups, and large ones are cut
MAX_UNSCORABLE_SHARE = 0.1


def without_unscorable(prompts: Any, rewards: Mapping[str, tuple[Callable, float]]) -> Any:
    """The prompts less those whose gold or tests a reward cannot use; each kind is said.

    Raises ConfigError where they are more than `MAX_UNSCORABLE_SHARE`: a wrong column, most likely.
    """
    columns = {name: prompts[name] for name in prompts.column_names if name != "prompt_ids"}
    problems = find_unscorable(rewards, columns)
    if not problems:
        return prompts
    row, problem = next(iter(problems.items()))
    found = (
        f"{len(problems):,} of {len(prompts):,} prompts cannot be scored; the first: "
        f"{columns['prompt'][row][-60:]!r}, {problem}."
    )
    if len(problems) > MAX_UNSCORABLE_SHARE * len(prompts):
        raise ConfigError(f"{found} More than {MAX_UNSCORABLE_SHARE:.0%} is taken for a mistake.")
    say(f"{found} They are left out.")
    return prompts.select([i for i in range(len(prompts)) if i not in problems])


def check_batch(args: Any, num_generations: int, updates_per_rollout: int) -> None:
    batch = args.per_device_train_batch_size
    if batch % num_generations:
        raise ConfigError(
            f"--per_device_train_batch_size counts answers: expected a multiple of "
            f"--num_generations ({num_generations}), found {batch}."
        )
    if args.max_steps <= 0:
        raise ConfigError("--max_steps: RL has no epochs; expected a number of steps above 0.")
    if args.max_steps % updates_per_rollout:
        raise ConfigError(
            f"--max_steps {args.max_steps}: expected a multiple of --updates_per_rollout "
            f"({updates_per_rollout}), so that the last rollout is used up."
        )
    if args.save_strategy != "no" and args.save_steps % updates_per_rollout:
        raise ConfigError(
            f"--save_steps {args.save_steps:g}: expected a multiple of --updates_per_rollout "
            f"({updates_per_rollout}), so that a resumed run starts with a fresh rollout."
        )


def refuse_fsdp(accelerator: Any) -> None:
    if accelerator.distributed_type == DistributedType.FSDP:
        raise ConfigError(
            "RL does not run under FSDP, whose ranks would have to decode in step. Use "
            "accelerate_configs/ddp.yaml, zero2.yaml or zero3.yaml."
        )


def check_selection(selection: Selection, rewards: Mapping[str, Any]) -> None:
    if selection.spread_of not in (None, *rewards):
        raise ConfigError(
            f"selection: expected spread_of to name a reward ({', '.join(rewards)}), "
            f"found {selection.spread_of!r}."
        )


def check_loss(loss: Callable[..., Tensor], per: str) -> None:
    try:
        inspect.signature(loss).bind(*LOSS_INPUTS)
    except TypeError as error:
        raise ConfigError(
            f"loss {getattr(loss, '__name__', loss)}: expected f({', '.join(LOSS_INPUTS)}), all "
            f"else bound with functools.partial; found f{inspect.signature(loss)} ({error})."
        ) from None
    if per not in UNITS:
        raise ConfigError(f"per: expected one of {', '.join(UNITS)}; found {per!r}.")


def check_sampling(
    sampling: Sampling, correction: Any, *, engine: Any, is_overlapped: bool
) -> None:
    """Answers that the policy of now has not drawn itself need weights for the difference."""
    reasons = {
        "with top_k, top_p or min_tokens": sampling.is_restricted,
        "where an engine draws": engine is not None,
        "with overlap_rollouts": is_overlapped,
    }
    found = [reason for reason, holds in reasons.items() if holds]
    if found and correction is None:
        raise ConfigError(
            f"sampling: {' and '.join(found)}, answers come from another distribution than the "
            "policy's. Pass a correction (posttrain.losses: tis_weights, …; --correction tis) or "
            "drop them."
        )
    if not sampling.temperature:
        raise ConfigError(
            "sampling: expected a temperature above 0, found 0. Greedy answers are all the same, "
            "and there is nothing to learn from."
        )


def check_advantage(advantage: Callable[..., Tensor], num_generations: int) -> None:
    """It takes groups of this size: one answer is not better or worse than the others."""
    answers = [Completion([0], [0.0], finish_reason="stop")] * num_generations
    group = DrawnGroup({}, answers, torch.zeros(num_generations), has_spread=False)
    try:
        assign_advantages([group], advantage)
    except ValueError as error:
        raise ConfigError(f"num_generations {num_generations}: {error}") from None


def check_kl(beta: float, kl: Callable[..., Tensor]) -> None:
    if beta and kl is kl_k1:
        raise ConfigError(
            "kl: expected kl_k2, kl_k3 or kl_k3_plus in the loss, where the expected gradient of "
            "kl_k1 is 0. It belongs in the reward: reward_kl_coef in the place of beta."
        )
