"""The report of a run: one self-contained page that says whether it worked, why, and what it wrote.

    posttrain report runs/r1_zero                    # writes runs/r1_zero/report.html
    posttrain compare runs/sft runs/dpo --output compare.html

`run` reads a run folder, `model` has the types of a report and `build` fills them, `charts` turns
numbers into SVG, `page` renders the templates. Nothing here loads torch: a report takes less than
a second, in a process of its own.
"""

import subprocess
import sys
from pathlib import Path

# The process that makes a run's report, which takes the run folder as its argument.
COMMAND = (sys.executable, "-m", "posttrain.report")
SETTINGS = {
    "cwd": Path(__file__).parents[2],
    "stdout": subprocess.DEVNULL,
    "stderr": subprocess.PIPE,
    "text": True,
    "start_new_session": True,  # a Ctrl-C is for the run
}
