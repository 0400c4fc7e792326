#!/bin/bash
# transformers' DeepSeek V3.2: log-probs of a prefix change when later tokens are appended.
#
# Versions: torch 2.13.0, transformers 5.23.0; Python 3.11.
# Guess: a causal LM's log-probs of the first 41 tokens are the same, up to rounding, whether 41 or 48
#   tokens are given, also where each query attends to the top k keys of an indexer alone.
# Behaviour: with fewer keys than tokens (index_topk 16) they differ by nats. The indexer's scores go
#   through a ReLU: a third of the last query's are exactly 0 here. Where the 16th and the 17th score
#   of a query are equal (3 of 24 queries in a layer), which of them top-k takes depends on how many
#   keys there are. With index_topk above the length nothing is chosen, and the prefix is unchanged.
#   So forwards of such a model by other lengths, packed, padded or cached, need not agree.
# Output seen:
#   index_topk 16: more than 0.1 nats
#   index_topk 64: at most 0.0001 nats
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0
cat > "$folder/prefix.py" << 'PYTHON'
import torch
from transformers import AutoConfig, AutoModelForCausalLM

for k in (16, 64):
    config = AutoConfig.for_model(
        "deepseek_v32", vocab_size=300, hidden_size=64, intermediate_size=96,
        moe_intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, q_lora_rank=32, kv_lora_rank=32, qk_rope_head_dim=8,
        qk_nope_head_dim=16, v_head_dim=16, head_dim=8, n_routed_experts=4, n_shared_experts=1,
        num_experts_per_tok=2, n_group=1, topk_group=1, first_k_dense_replace=1,
        index_head_dim=16, index_n_heads=2, index_topk=k, max_position_embeddings=256,
        pad_token_id=0, bos_token_id=2, eos_token_id=1, initializer_range=0.15,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for weight in model.parameters():
        if weight.ndim >= 2:
            torch.nn.init.normal_(weight, std=0.15)
    ids = torch.randint(3, 300, (1, 48))
    with torch.no_grad():
        short, long = (model(ids[:, :n], use_cache=False).logits[0, :41].log_softmax(-1)
                       for n in (41, 48))
    gap = (short - long).abs().max().item()
    words = "more than 0.1" if gap > 0.1 else "at most 0.0001" if gap <= 1e-4 else f"{gap:.2g}"
    print(f"index_topk {k}: {words} nats")
PYTHON
cd "$folder"
venv/bin/python prefix.py 2> errors | tee seen || { cat errors; exit 1; }
diff seen - << 'SEEN'
index_topk 16: more than 0.1 nats
index_topk 64: at most 0.0001 nats
SEEN
