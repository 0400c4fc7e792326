"""Says what the metrics of a run mean, while it runs: RLTrainer's default callback.

Each finding of `posttrain.watch` is printed once when it begins to hold, by the main process. Log
lines get `warnings`, how many hold; the end of training says on how many lines each did.
"""

from typing import Any

from transformers import TrainerCallback

from posttrain.console import say
from posttrain.watch import Watch


class WatchCallback(TrainerCallback):
    """Watches the trainer that it is passed to; a resumed run is watched from its beginning."""

    def attach(self, trainer: Any) -> None:
        """Called by the trainer; the first of its rewards is the one that counts."""
        self.parts = list(trainer.rewards)

    def on_train_begin(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
        self.watch = Watch(self.parts)
        for line in state.log_history:
            if "loss" in line:
                self.watch.read(line)

    def on_log(
        self, _args: Any, state: Any, _control: Any, logs: dict | None = None, **_: Any
    ) -> None:
        if not state.is_world_process_zero or not logs or "loss" not in logs:
            return
        for finding in self.watch.read(logs):
            say(str(finding))
        logs["warnings"] = self.watch.num_warnings

    def on_train_end(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
        held = [f"{name} on {n}" for name, n in self.watch.counts.items() if n]
        if state.is_world_process_zero and held:
            say(f"warnings of {len(self.watch.lines)} log lines: {', '.join(held)}")
