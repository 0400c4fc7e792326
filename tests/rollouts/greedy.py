"""Prompts of many lengths, and the completions that transformers' generate gives for them."""

import random

import torch

from tests.conftest import random_ids

STOP_IDS = tuple(range(1, 12))  # one token in nine: completions of all lengths
MAX_TOKENS = 12


def prompts(count=64):
    """Prompts of 1 to 39 random tokens, the same at every call."""
    dice = random.Random(0)
    return [random_ids(dice.randrange(1, 40), dice) for _ in range(count)]


def generate_alone(model):
    """Greedy completions of `prompts()`, each generated alone by transformers."""
    settings = {"do_sample": False, "max_new_tokens": MAX_TOKENS, "eos_token_id": list(STOP_IDS)}
    return [
        model.generate(torch.tensor([prompt]), **settings)[0, len(prompt) :].tolist()
        for prompt in prompts()
    ]
