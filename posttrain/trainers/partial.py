"""The former name of RL over partial rollouts, kept for one release.

Take `RLTrainer` with `posttrain.rollouts.partial_source.PartialRollouts` as its rollouts.
"""

from posttrain.trainers.rl import RLTrainer as PartialRolloutTrainer

__all__ = ["PartialRolloutTrainer"]
