"""Shared by the parts of benchmarks.gpu_check: lines of its table, and the sizes of the work.

line = Line("DPO, TRL's seconds over ours", 2.3, "x", goal=2.0)
line.is_met                               # True
"""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from benchmarks.child import Job


@dataclass(frozen=True)
class Line:
    """A line of the table.

    found: None where nothing could be measured, for the reason in `note`. goal: None where there is
    none. at_most: the goal bounds `found` from above.
    """

    what: str
    found: float | None
    unit: str = ""
    goal: float | None = None
    at_most: bool = False
    note: str = ""

    @property
    def is_met(self) -> bool | None:
        """True if the goal is met; None where there is no goal, or nothing was measured."""
        if self.found is None or self.goal is None:
            return None
        return self.found <= self.goal if self.at_most else self.found >= self.goal


@dataclass(frozen=True)
class Scale:
    """The amounts of work of one `--size`.

    Attributes:
        size: A name of benchmarks.workload.SIZES.
        shrink: Divisor of the sequences on which kernels are compared.
        documents: Documents of an SFT step.
        pairs: Pairs of a DPO step.
        prompts: Prompts of a GRPO step, with 8 completions each.
        at_once: Pairs, and twice as many completions, of TRL's micro-batches in its second setting.
        packed: Packed tokens of the SFT steps whose cost a token is compared.
        steps: Measured optimizer steps, after one of warm-up.
    """

    size: str
    shrink: int
    documents: int
    pairs: int
    prompts: int
    at_once: int
    packed: tuple[int, ...]
    steps: int


SCALES = {
    "1b": Scale("1b", 1, 384, 16, 8, 8, (8_192, 16_384, 32_768, 65_536), 3),
    "tiny": Scale("tiny", 10, 4, 2, 1, 2, (512, 1_024), 1),
}


def scale_of(job: Job) -> Scale:
    """Return the amounts of work that a job's setting names."""
    return SCALES[job.setting["size"]]


def with_examples(job: Job, examples: list[dict], batch_size: int) -> Job:
    """Write the examples into the job's folder, and return the job with them."""
    data = Path(job.folder) / "examples.json"
    data.parent.mkdir(parents=True, exist_ok=True)
    data.write_text(json.dumps(examples))
    return replace(job, data=str(data), batch_size=batch_size)


def rows(*lines: Line) -> list[dict]:
    """Return the lines as JSON can hold them."""
    return [asdict(line) for line in lines]
