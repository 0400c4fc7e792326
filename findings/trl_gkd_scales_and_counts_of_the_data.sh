#!/bin/bash
# TRL's GKDTrainer: its temperature is that of sampling alone, and a batch that the student has
# written is divided by the number of tokens of the batch that it replaces.
#
# Versions: torch 2.13.0, transformers 5.23.0, accelerate 1.15.0, datasets 5.2.0, trl 1.16.0.
# Guess: temperature also divides the logits of student and teacher in the divergence, which has an
#   argument of this name; the loss of an on-policy batch is a mean over the tokens it trains.
# Behaviour: compute_loss does not pass the temperature on, so the loss is at temperature 1. The
#   Trainer counts the labels of the data before training_step puts the student's completions in
#   their place, and the sum over the new tokens is divided by the old count: completions four times
#   as short as the data's have a quarter of the gradient, and longer ones more than a mean.
# Output seen:
#   losses at temperatures 0.5 and 2: equal
#   on-policy: 2 tokens are trained, the sum is divided by 8
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 accelerate==1.15.0 \
    datasets==5.2.0 trl==1.16.0
cat > "$folder/gkd.py" << 'PYTHON'
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl.experimental.gkd import GKDConfig, GKDTrainer

words = {word: i for i, word in enumerate(["<pad>", "<end>", *"abcdefghij"])}
backend = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
backend.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=backend,
    pad_token="<pad>",
    eos_token="<end>",
    padding_side="left",
    chat_template="{% for m in messages %}{{ m['content'] }} {% endfor %}",
)
shape = {"vocab_size": len(words), "hidden_size": 16, "intermediate_size": 16}
shape |= {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
torch.manual_seed(0)
student, teacher = (
    LlamaForCausalLM(LlamaConfig(**shape, pad_token_id=0, eos_token_id=1)) for _ in range(2)
)
with torch.no_grad():
    for weight in (*student.parameters(), *teacher.parameters()):
        weight.mul_(10)  # or all divergences are about 0
turns = [{"role": "user", "content": "a b c"}, {"role": "assistant", "content": "d e f g"}]
rows = Dataset.from_list([{"messages": turns}] * 2)


class Looking(GKDTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        trained = (inputs["labels"][:, 1:] != -100).sum()
        seen.append((float(loss), int(num_items_in_batch), int(trained)))
        return loss


seen = []
for share, temperature in ((0.0, 0.5), (0.0, 2.0), (1.0, 0.5)):
    settings = {"lmbda": share, "temperature": temperature, "max_new_tokens": 20}
    arguments = GKDConfig(
        "run",
        **settings,
        use_cpu=True,
        bf16=False,
        max_steps=1,
        per_device_train_batch_size=2,
        learning_rate=0.0,
        report_to="none",
        save_strategy="no",
    )
    Looking(student, teacher, arguments, train_dataset=rows, processing_class=tokenizer).train()
cold, hot, own = seen
assert cold[0] > 0
print(f"losses at temperatures 0.5 and 2: {'equal' if cold[0] == hot[0] else 'different'}")
print(f"on-policy: {own[2]} tokens are trained, the sum is divided by {own[1]}")
PYTHON
cd "$folder"
HF_HUB_OFFLINE=1 venv/bin/python gkd.py 2> errors | grep -E "^(losses|on-policy)" | tee seen || { cat errors; exit 1; }
diff seen - << 'SEEN'
losses at temperatures 0.5 and 2: equal
on-policy: 2 tokens are trained, the sum is divided by 8
SEEN
