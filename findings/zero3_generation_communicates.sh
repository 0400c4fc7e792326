#!/bin/bash
# TRL over DeepSpeed: before the first training step, a forward inside unwrap_model_for_generation
# still communicates, although it gathers the weights and takes the ZeRO-3 hooks off.
#
# Versions: torch 2.13.0, transformers 5.23.0, accelerate 1.15.0, deepspeed 0.19.8, trl 1.16.0.
# Guess: inside the context the model is whole and bare, so a forward makes no collective, and ranks
#   may decode different numbers of tokens.
# Behaviour: the context removes the hooks that DeepSpeed lists in forward_hooks and backward_hooks.
#   The hook that begins a forward is registered apart from them (fwd_pre_hook) and stays. Until the
#   engine knows a whole trace it compares the order of modules over all ranks: collectives in the
#   first forwards, none later. Ranks that run the same number of forwards notice nothing. Ranks whose
#   generations end after different numbers there waited for each other when we saw it in a test.
# Output seen:
#   collectives in each of four forwards: [1, 3, 0, 0]
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 accelerate==1.15.0 \
    deepspeed==0.19.8 trl==1.16.0
cat > "$folder/count.py" << 'PYTHON'
import deepspeed.ops
import deepspeed.runtime.zero.partitioned_param_coordinator as coordinator
import torch
from accelerate import Accelerator, DeepSpeedPlugin, PartialState
from transformers import AutoModelForCausalLM, LlamaConfig
from trl.models import unwrap_model_for_generation

deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # nothing is compiled
calls, plain = [], coordinator.assert_ints_same_as_other_ranks
coordinator.assert_ints_same_as_other_ranks = lambda ints: (calls.append(1), plain(ints))
config = {
    "zero_optimization": {"stage": 3},
    "train_micro_batch_size_per_gpu": 1,
    "gradient_accumulation_steps": 1,
}
PartialState(cpu=True)
plugin = DeepSpeedPlugin(hf_ds_config=config, zero3_init_flag=False)
accelerator = Accelerator(deepspeed_plugin=plugin)
shape = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
model = AutoModelForCausalLM.from_config(
    LlamaConfig(**shape, num_attention_heads=2, num_key_value_heads=2)
)
model, _ = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
counts = []
with unwrap_model_for_generation(model, accelerator) as bare, torch.no_grad():
    for _ in range(4):  # the same number on both ranks
        before = len(calls)
        bare(input_ids=torch.tensor([[1, 2, 3]]))
        counts.append(len(calls) - before)
if accelerator.process_index == 0:
    print(f"collectives in each of four forwards: {counts}")
PYTHON
cd "$folder"
DS_ACCELERATOR=cpu ACCELERATE_USE_DEEPSPEED=true venv/bin/torchrun --standalone --nproc_per_node 2 \
    count.py 2> errors | grep collectives | tee seen || { cat errors; exit 1; }
diff seen - << 'SEEN'
collectives in each of four forwards: [1, 3, 0, 0]
SEEN
