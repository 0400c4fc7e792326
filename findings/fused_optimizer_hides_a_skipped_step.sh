#!/bin/bash
# accelerate: with a fused optimizer, a step that loss scaling skips is taken for a step.
#
# Versions: torch 2.13.0, accelerate 1.15.0; Python 3.11.
# Guess: after a gradient that is not finite, optimizer_step_was_skipped is True, so that a learning
#   rate schedule waits. transformers' Trainer reads it, and its default optimizer is fused.
# Behaviour: accelerate sees whether the scaler called the optimizer. It always calls a fused one,
#   whose kernel skips by itself. Scale and weights are right, and the schedule goes on.
# Output seen:
#   fused=False scale 32768.0 moved False skipped True
#   fused=True scale 32768.0 moved False skipped False
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 accelerate==1.15.0
cat > "$folder/skip.py" << 'PYTHON'
import torch
from accelerate import Accelerator

accelerator = Accelerator(cpu=True)
accelerator.scaler = torch.amp.GradScaler("cpu")  # on CUDA mixed_precision="fp16" makes one
for fused in (False, True):
    accelerator.scaler.update(65536.0) if accelerator.scaler._scale is not None else None
    accelerator._optimizers.clear()
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = accelerator.prepare(torch.optim.AdamW([weight], fused=fused))
    accelerator.backward((weight * torch.inf).sum())
    optimizer.step()
    moved, skipped = bool((weight != 1).any()), accelerator.optimizer_step_was_skipped
    print(f"fused={fused} scale {accelerator.scaler.get_scale()} moved {moved} skipped {skipped}")
PYTHON
cd "$folder"
venv/bin/python skip.py 2> errors | tee seen || { cat errors; exit 1; }
diff seen - << 'SEEN'
fused=False scale 32768.0 moved False skipped True
fused=True scale 32768.0 moved False skipped False
SEEN
