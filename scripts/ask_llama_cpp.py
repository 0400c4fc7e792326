"""Greedy continuations by llama.cpp, as one line of JSON: started by scripts/to_gguf.py.

    python scripts/ask_llama_cpp.py MODEL.gguf '[["a prompt", …], new tokens, likeliest tokens]'

For each prompt a list of steps: the token's `id`, and `id` and `logprob` of the likeliest ones.
"""

import json
import sys

import xllamacpp

path, (texts, new_tokens, top) = sys.argv[1], json.loads(sys.argv[2])
settings = xllamacpp.CommonParams()
settings.model.path, settings.n_ctx = path, 1024
settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
# Flash attention computes in half precision on a CPU, whatever the cache holds.
settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
server = xllamacpp.Server(settings)
asked = {"n_predict": new_tokens, "temperature": 0, "n_probs": top, "cache_prompt": False}
found = []
for text in texts:
    answer = server.handle_completions({"prompt": text, **asked})
    answer = answer if isinstance(answer, dict) else json.loads(answer)
    found.append(answer["choices"][0]["logprobs"]["content"])
print(json.dumps(found), flush=True)
