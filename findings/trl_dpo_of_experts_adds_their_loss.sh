#!/bin/bash
# TRL: DPO of a mixture of experts adds the load-balancing loss that the model's config leaves off.
#
# Versions: trl 1.16.0, transformers 5.23.0, torch 2.13.0; Python 3.11.
# Guess: with output_router_logits false, as in published configs, transformers adds no load-balancing
#   loss, whatever router_aux_loss_coef says; so DPO, whose policy starts as its reference, has the
#   first loss log 2, as of any other model.
# Behaviour: DPOTrainer asks for the router logits itself and adds the config's coefficient times the
#   balancing loss, which is about the number of experts of a token: the first loss is log 2 + 0.2 at a
#   coefficient of 0.1, the curve of the preference loss cannot be read off it, and its gradient moves
#   the routers. DPOConfig(router_aux_loss_coef=0.0) turns it off.
# Output seen:
#   llama: router_aux_loss_coef 0.0, first loss log 2
#   mixtral: router_aux_loss_coef 0.1, first loss log 2 + 0.200
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 trl==1.16.0
cat > "$folder/look.py" << 'PYTHON'
import math
import sys

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer

words = {"<pad>": 0, "<end>": 1} | {f"w{i}": i for i in range(2, 100)}
backend = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=backend, pad_token="<pad>", eos_token="<end>", unk_token="<pad>"
)
pair = {"prompt": "w5 w6", "chosen": " w7 w8", "rejected": " w9 w10 w11"}


def first_loss(family, **sizes):
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        family, vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, head_dim=16, pad_token_id=0, eos_token_id=1,
        bos_token_id=None, **sizes,
    )
    assert not getattr(config, "output_router_logits", False)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(family)
    settings = DPOConfig(
        output_dir="out", max_steps=1, per_device_train_batch_size=2, use_cpu=True, bf16=False,
        report_to="none", save_strategy="no", logging_steps=1, disable_tqdm=True,
        gradient_checkpointing=False,
    )
    trainer = DPOTrainer(
        AutoModelForCausalLM.from_pretrained(family, dtype=torch.float32), args=settings,
        train_dataset=Dataset.from_list([pair] * 4), processing_class=tokenizer,
    )
    trainer.train()
    loss = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    coef = getattr(config, "router_aux_loss_coef", 0.0)
    over = loss - math.log(2)
    print(f"{family}: router_aux_loss_coef {coef}, first loss log 2", end="")
    print(f" + {over:.3f}" if over > 1e-4 else "", flush=True)


first_loss("llama")
first_loss("mixtral", num_local_experts=4, num_experts_per_tok=2, router_aux_loss_coef=0.1)
PYTHON
cd "$folder"
HF_HUB_OFFLINE=1 venv/bin/python look.py > said 2> errors || { tail -5 errors; exit 1; }
grep "first loss" said | tee seen
diff seen - << 'SEEN'
llama: router_aux_loss_coef 0.0, first loss log 2
mixtral: router_aux_loss_coef 0.1, first loss log 2 + 0.200
SEEN
