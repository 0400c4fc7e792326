#!/bin/bash
# transformers' TrainingArguments: ddp_timeout does not reach the process group of CPU ranks.
#
# Versions: torch 2.13.0, transformers 5.23.0, accelerate 1.15.0; Python 3.11.
# Guess: with ddp_timeout=7 the group that TrainingArguments sets up for two gloo ranks has a timeout
#   of 7 seconds, as the documentation says of init_process_group.
# Behaviour: the arguments report 7 seconds, and the group has gloo's own 30 minutes. With use_cpu the
#   branch of TrainingArguments that starts accelerate's state passes the backend on, not the timeout.
#   Whoever makes PartialState(cpu=True, timeout=...) first gets what they asked for.
# Output seen:
#   asked for 7 s, the group has 1800 s
#   with PartialState first, the group has 7 s
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 accelerate==1.15.0
cat > "$folder/ask.py" << 'PYTHON'
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from accelerate import PartialState
from transformers import TrainingArguments

if sys.argv[1] == "first":
    PartialState(cpu=True, timeout=timedelta(seconds=7))
arguments = TrainingArguments(output_dir="out", use_cpu=True, ddp_timeout=7, report_to=[])
arguments.device  # starts the process group
group = dist.distributed_c10d._get_default_group()._get_backend(torch.device("cpu"))
found = group.options._timeout.total_seconds()
if dist.get_rank() == 0:
    if sys.argv[1] == "first":
        print(f"with PartialState first, the group has {found:.0f} s")
    else:
        asked = arguments.ddp_timeout_delta.total_seconds()
        print(f"asked for {asked:.0f} s, the group has {found:.0f} s")
PYTHON
cd "$folder"
for who in arguments first; do
    venv/bin/torchrun --standalone --nproc_per_node 2 ask.py "$who" 2> errors || { cat errors; exit 1; }
done | tee seen
diff seen - << 'SEEN'
asked for 7 s, the group has 1800 s
with PartialState first, the group has 7 s
SEEN
