"""Make the report of a run folder: `python -m posttrain.report runs/r1_zero`.

With a name and a working folder behind it the card of the run's model is written, too: by that name
it says how to load the model, and in that folder relative paths begin.
"""

import os
import sys
from pathlib import Path

from posttrain.report.card import card_of
from posttrain.report.page import write_report
from posttrain.run.folder import write_whole
from posttrain.run.options import plain_errors

if __name__ == "__main__":
    with plain_errors():
        folder, *card = sys.argv[1:]
        write_report(folder)
        if card:
            name, working_folder = card
            os.chdir(working_folder)
            model = Path(folder) / "model"
            write_whole(model / "README.md", card_of(folder, model, name=name))
