"""Make the report of a run folder: `python -m posttrain.report runs/r1_zero`."""

import sys

from posttrain.report.page import write_report
from posttrain.run.options import plain_errors

if __name__ == "__main__":
    with plain_errors():
        write_report(sys.argv[1])
