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
    """The task of one measured process.

    Attributes:
        function: `module:function`.
        setting: The choices of this side.
        model: Folder of the model.
        data: JSON file of the examples in order, `warmup_steps` and then `steps` batches of them.
        folder: The folder of this process alone.
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
        """True where the model computes in bfloat16."""
        return self.dtype == "bfloat16"

    def examples(self) -> list[dict]:
        """Read the examples of the warm-up and measured steps."""
        count = (self.warmup_steps + self.steps) * self.batch_size
        return json.loads(Path(self.data).read_text())[:count]

    def save(self) -> Path:
        """Write the job as JSON into its folder, and return the path."""
        path = Path(self.folder) / "job.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self)))
        return path


def call(job: Job) -> Any:
    """Call the job's function with the job."""
    module, _, function = job.function.partition(":")
    return getattr(importlib.import_module(module), function)(job)


def one_after_the_other(job: Job) -> list[Any]:
    """Call one function with several settings, so that a search pays for the imports once."""
    function, settings = job.setting["function"], job.setting["settings"]
    return [call(replace(job, function=function, setting=setting)) for setting in settings]


def main(path: Path) -> None:
    """Run the job at this path, and write result.json beside it."""
    from posttrain.run.options import set_up_libraries

    set_up_libraries()
    import torch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    job = Job(**json.loads(path.read_text()))
    path.with_name("result.json").write_text(json.dumps(call(job)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
