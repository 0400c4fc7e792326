#!/bin/bash
# torchrun --max_restarts: the ranks of a restart get the store of the ranks before them, as it was left.
#
# Versions: torch 2.13.0; Python 3.11.
# Guess: each restart has a store of its own (torch's rendezvous says so in a comment where it drops the
#   prefix of the attempt), so what a rank wrote into the default store is gone in the next attempt.
# Behaviour: with --rdzv_backend static and c10d alike, restarted ranks on one machine reach the same
#   store under the same prefix. A key of attempt 0 is there in attempt 1, and among such keys are the
#   addresses under which gloo's ranks find each other. A rank that looks before the other has written
#   anew finds the address of a process that is gone; in four of six tries by hand the restart then
#   waited without end. A PrefixStore with TORCHELASTIC_RESTART_COUNT in it, given to
#   init_process_group, avoids it.
# Output seen:
#   static: attempt 0 finds nothing, attempt 1 finds "written in attempt 0"
#   c10d: attempt 0 finds nothing, attempt 1 finds "written in attempt 0"
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0
cat > "$folder/look.py" << 'PYTHON'
import os
import sys

import torch.distributed as dist

store, _, _ = next(dist.rendezvous("env://"))
attempt = os.environ["TORCHELASTIC_RESTART_COUNT"]
found = f'"{store.get("note").decode()}"' if store.check(["note"]) else "nothing"
print(f"attempt {attempt} finds {found}", flush=True)
store.set("note", f"written in attempt {attempt}")
sys.exit(attempt == "0")
PYTHON
cd "$folder"
for backend in static c10d; do
    venv/bin/torchrun --nproc_per_node 1 --max_restarts 1 --rdzv_backend $backend \
        --rdzv_endpoint 127.0.0.1:29417 --master_port 29417 look.py > out 2> errors \
        || { cat errors; exit 1; }
    echo "$backend: $(paste -sd, out | sed 's/,/, /g')"
done | tee seen
diff seen - << 'SEEN'
static: attempt 0 finds nothing, attempt 1 finds "written in attempt 0"
c10d: attempt 0 finds nothing, attempt 1 finds "written in attempt 0"
SEEN
