"""Planned memory against the peak of real CPU runs, at three sizes of a LLaMA.

    python -m benchmarks.planned_memory

Each size trains by SFT in a process of its own, two micro-batches a step. Measured is how far the
process's peak of resident memory lies above what it held before the model was made. A forward has
the tokens that it has on a CPU by default.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys

from posttrain.run.options import set_up_libraries

# hidden size, layers, tokens of a micro-batch
SIZES = ((384, 6, 2048), (512, 8, 2048), (768, 8, 2048))
VOCABULARY, MIB = 8192, 2**20


def measure(hidden: int, layers: int, tokens: int) -> dict[str, float]:
    """Train two steps in this process, and return planned and measured MiB."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, TrainingArguments

    from posttrain.data import load_documents
    from posttrain.losses import nll_loss
    from posttrain.packed.memory import Setup, memory, peak, shape_of
    from posttrain.trainers.sft import SFTTrainer

    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained("data/tiny_tokenizer")
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        vocab_size=VOCABULARY,
        tie_word_embeddings=True,
    )
    planned = peak(memory(shape_of(config, half=False), Setup(tokens=tokens, on_gpu=False)))
    rows = [{"text": "0123456789 " * 12}] * 400
    documents = load_documents(rows, tokenizer, template="plain", say=lambda _: None)
    length = len(documents[0]["input_ids"])
    batch = 2 * (tokens // length)
    before = resident()
    arguments = TrainingArguments(
        "runs/planned_memory",
        max_steps=2,
        per_device_train_batch_size=batch,
        use_cpu=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = SFTTrainer(
        LlamaForCausalLM(config),
        arguments,
        documents=documents,
        tokenizer=tokenizer,
        loss=nll_loss,
        max_tokens_per_microbatch=tokens,
    )
    trainer.train()
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    parameters = sum(p.numel() for p in trainer.model.parameters())
    return {
        "parameters": parameters,
        "planned": planned / MIB,
        "measured": (most - before) / MIB,
    }


def resident() -> int:
    """Return the bytes of this process that lie in memory."""
    with open("/proc/self/statm", encoding="utf-8") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def main() -> None:
    """Print a line for each size."""
    for size in SIZES:
        command = [sys.executable, "-m", "benchmarks.planned_memory", *map(str, size)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        print(
            f"{found['parameters'] / 1e6:6.1f}M parameters, {size[2]} tokens: planned "
            f"{found['planned']:6.0f} MiB, measured {found['measured']:6.0f} MiB, ratio "
            f"{found['planned'] / found['measured']:.2f}",
            flush=True,
        )


if __name__ == "__main__":
    set_up_libraries()
    if len(sys.argv) > 1:
        print(json.dumps(measure(*map(int, sys.argv[1:]))))
    else:
        main()
