"""Which teacher a recipe's settings name; only its own libraries are loaded."""

import os
from typing import Any

from posttrain.teachers.interface import Teacher


def choose_teacher(config: Any) -> Teacher:
    """A server if there is a teacher_url, else a model on this machine, else a recording.

    config: has the settings of recipes/self_instruct.py whose names begin with `teacher_`, and
    concurrency, timeout_seconds, max_attempts. The key is read from the environment only.
    """
    if config.teacher_url:
        from posttrain.teachers.server import ServerTeacher

        return ServerTeacher(
            config.teacher_url,
            model=config.teacher_model,
            key=os.environ.get(config.teacher_key_variable),
            concurrency=config.concurrency,
            timeout_seconds=config.timeout_seconds,
            max_attempts=config.max_attempts,
        )
    if config.teacher_model:
        from posttrain.teachers.local import LocalTeacher

        return LocalTeacher(config.teacher_model, batch_size=config.concurrency)
    from posttrain.teachers.replay import ReplayTeacher

    return ReplayTeacher(config.teacher_replay)
