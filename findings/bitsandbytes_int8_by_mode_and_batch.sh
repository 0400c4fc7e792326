#!/bin/bash
# bitsandbytes: an 8-bit layer on a CPU computes otherwise in training, and in evaluation by its batch.
#
# Versions: bitsandbytes 0.50.2, torch 2.13.0; Python 3.11.
# Guess: the weight of Linear8bitLt is frozen and quantised once, so its output for a row of inputs is
#   the same after train() and after eval(), and does not depend on the other rows.
# Behaviour: on a CPU training multiplies by the dequantised weight and leaves the inputs as they are;
#   evaluation rounds the inputs to 8 bits as well, row by row, and treats columns in which any row of
#   the batch exceeds the threshold apart. Sampling in evaluation and training on what was sampled are
#   two policies therefore, and a row's log-probs change with its neighbours.
# Output seen:
#   training against evaluation: more than 0.1 %
#   in evaluation, alone against beside a row of outliers: more than 0.1 %
#   in training, the same: no difference
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 bitsandbytes==0.50.2 numpy
cat > "$folder/look.py" << 'PYTHON'
import torch, logging
logging.disable(logging.WARNING)
import bitsandbytes as bnb

torch.manual_seed(0)
weight = torch.randn(64, 256) / 16
layer = bnb.nn.Linear8bitLt(256, 64, bias=False, has_fp16_weights=False, threshold=6.0)
layer.load_state_dict({"weight": weight})
layer = layer.to("cpu")
row, other = torch.randn(1, 256), torch.randn(1, 256)
other[0, ::4] = 50.0  # outliers in a quarter of the columns


def outputs(training, rows):
    layer.train(training)
    with torch.no_grad():
        return layer(rows)[0]


def gap(a, b):
    return ((a - b).norm() / b.norm()).item()


exact = (row @ weight.T)[0]
training, evaluation = outputs(True, row), outputs(False, row)
beside = outputs(False, torch.cat([row, other]))
for name, a, b in (
    ("training against evaluation", training, evaluation),
    ("in evaluation, alone against beside a row of outliers", evaluation, beside),
    ("in training, the same", outputs(True, row), outputs(True, torch.cat([row, other]))),
):
    found = gap(a, b)
    print(f"{name}: {'no difference' if found < 1e-6 else 'more than 0.1 %' if found > 1e-3 else found}")
PYTHON
cd "$folder"
venv/bin/python look.py 2> errors | tee seen || { tail -5 errors; exit 1; }
diff seen - << 'SEEN'
training against evaluation: more than 0.1 %
in evaluation, alone against beside a row of outliers: more than 0.1 %
in training, the same: no difference
SEEN
