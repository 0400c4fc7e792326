"""One measured process: `python -m benchmarks.child job.json` writes its result beside the job.

The harness starts it with the thread count in its environment. A job names a function of a
benchmark, `module:function`, which is called with the Job and returns what JSON can hold.
"""

import importlib
import json
import os
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Job:
    """What one measured process is to do.

    function: `module:function`. setting: what this side chooses. model: folder. data: JSON file of
    the examples in order, `warmup_steps` and then `steps` batches of them. folder: its own.
    """

    function: str
    setting: dict[str, Any]
    model: str
    data: str
    folder: str
    dtype: str
    batch_size: int
    steps: int
    warmup_steps: int = 1

    @property
    def is_half(self) -> bool:
        return self.dtype == "bfloat16"

    def examples(self) -> list[dict]:
        count = (self.warmup_steps + self.steps) * self.batch_size
        return json.loads(Path(self.data).read_text())[:count]

    def save(self) -> Path:
        path = Path(self.folder) / "job.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self)))
        return path


def call(job: Job) -> Any:
    module, _, function = job.function.partition(":")
    return getattr(importlib.import_module(module), function)(job)


def one_after_the_other(job: Job) -> list[Any]:
    """The results of one function with several settings: a search spares itself the imports."""
    function, settings = job.setting["function"], job.setting["settings"]
    return [call(replace(job, function=function, setting=setting)) for setting in settings]


def main(path: Path) -> None:
    from posttrain.run.console import set_up_libraries

    set_up_libraries()
    import torch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    job = Job(**json.loads(path.read_text()))
    path.with_name("result.json").write_text(json.dumps(call(job)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
