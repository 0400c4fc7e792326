#!/bin/bash
# accelerate: after skip_first_batches, gather_for_metrics no longer drops the examples that fill up
# the ranks' last batch.
#
# Versions: torch 2.13.0, accelerate 1.15.0; Python 3.11.
# Guess: 21 examples on two ranks in batches of 4 are gathered as 8, 8 and 5; with the first batch
#   skipped, as a resumed run does it, as 8 and 5.
# Behaviour: the batch sampler of the skipping loader has no batch size of its own, the error is
#   suppressed, and the number of real examples in the last batch stays unknown. gather_for_metrics
#   then returns all of it, with a line in the log. Three examples count twice.
# Output seen:
#   whole [8, 8, 5] [16, 17, 18, 19, 20]
#   skipped [8, 8] [16, 17, 18, 19, 20, 0, 1, 2]
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 accelerate==1.15.0
cat > "$folder/gather.py" << 'PYTHON'
import torch
from accelerate import Accelerator, skip_first_batches

accelerator = Accelerator(cpu=True)
loader = accelerator.prepare(torch.utils.data.DataLoader(list(range(21)), batch_size=4))
for name, batches in (("whole", loader), ("skipped", skip_first_batches(loader, 1))):
    seen = [accelerator.gather_for_metrics(batch).tolist() for batch in batches]
    if accelerator.process_index == 0:
        print(name, [len(examples) for examples in seen], seen[-1])
PYTHON
cd "$folder"
venv/bin/torchrun --standalone --nproc_per_node 2 gather.py 2> errors | tee seen || { cat errors; exit 1; }
diff seen - << 'SEEN'
whole [8, 8, 5] [16, 17, 18, 19, 20]
skipped [8, 8] [16, 17, 18, 19, 20, 0, 1, 2]
SEEN
