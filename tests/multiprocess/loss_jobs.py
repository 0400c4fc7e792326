"""Three steps with every loss of SFT, recipes/dpo.py, recipes/kto.py and the reward model, and with
every algorithm of recipes/grpo.py, for one cutting."""

import os
from functools import partial
from pathlib import Path

import torch

from tests.conftest import TINY, make_tokenizer
from tests.trainers import tiny
from tests.trainers.tiny import arguments, weights

EXAMPLES_PER_STEP = 8
COMPLETIONS = 4  # of each prompt, in RL
SMALL = 64  # packed tokens: a step then takes several micro-batches
SIZES = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
CUTS = {
    "whole": {},
    "microbatches": {"max_tokens": SMALL},
    "accumulation": {"accumulation": 4},
}
# Must depend on the cutting, so that these tests could fail: the token count of a micro-batch.
CONTROL = "control"


def losses() -> dict:
    """{name: (trainer, loss)}; "control" is CPO without the count over the whole batch."""
    from posttrain import losses as L
    from recipes import dpo, grpo, kto

    margins = partial(L.bradley_terry_loss, centering=0.01)
    return {
        "sft": ("sft", L.nll_loss),
        "dft": ("sft", L.dft_loss),
        "reward": ("reward", margins),
        "reward with margins": ("reward with margins", margins),
        **{name: ("preference", loss) for name, loss in dpo.losses().items()},
        **{f"unpaired {name}": ("unpaired", loss) for name, loss in kto.losses().items()},
        "unpaired kto, rising": ("unpaired", partial(L.kto_loss, weights=(1.0, 0.01))),
        **{f"rl {name}": ("rl", algorithm) for name, algorithm in grpo.algorithms().items()},
        CONTROL: ("preference", partial(L.cpo_loss, mean_chosen_length=None)),
    }


def make_model(auto_class: type, **settings) -> torch.nn.Module:
    """A random model of one layer, the same in every process."""
    from transformers import AutoConfig

    torch.manual_seed(0)
    return auto_class.from_config(AutoConfig.for_model("llama", **{**TINY, **SIZES, **settings}))


def make_trainer(kind: str, loss, args, max_tokens: int):
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    from posttrain.rewards.call import Scoring
    from posttrain.trainers.preference import PreferenceTrainer
    from posttrain.trainers.reward import RewardTrainer
    from posttrain.trainers.sft import SFTTrainer
    from posttrain.trainers.unpaired import UnpairedTrainer

    if kind == "rl":
        own = {
            "loss": loss.loss, "per": loss.per, "advantage": loss.advantage,
            "num_generations": COMPLETIONS, "scoring": Scoring(num_workers=0),
            "max_tokens_per_microbatch": max_tokens,
        }  # fmt: skip
        return tiny.rl_trainer(make_model(AutoModelForCausalLM), args, **own)
    settings = {
        "tokenizer": make_tokenizer(),
        "loss": loss,
        "max_tokens_per_microbatch": max_tokens,
    }
    if kind == "sft":
        model = make_model(AutoModelForCausalLM)
        return SFTTrainer(model, args, documents=tiny.documents(), **settings)
    if kind == "unpaired":
        model = make_model(AutoModelForCausalLM)
        return UnpairedTrainer(model, args, completions=tiny.completions(), **settings)
    pairs = tiny.pairs()
    if kind == "preference":
        return PreferenceTrainer(make_model(AutoModelForCausalLM), args, pairs=pairs, **settings)
    if kind == "reward with margins":
        pairs = pairs.add_column("margin", [i / 10 for i in range(len(pairs))])
    model = make_model(AutoModelForSequenceClassification, num_labels=1)
    return RewardTrainer(model, args, pairs=pairs, **settings)


def train(kind: str, loss, folder: Path, *, accumulation: int = 1, max_tokens: int = 16384):
    """The weights after STEPS steps of EXAMPLES_PER_STEP examples, cut as the settings tell."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()  # the run before this one in the same process is over
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    examples = EXAMPLES_PER_STEP * (COMPLETIONS if kind == "rl" else 1)
    args = arguments(
        folder,
        per_device_train_batch_size=examples // world_size // accumulation,
        gradient_accumulation_steps=accumulation,
        logging_strategy="no",
    )
    trainer = make_trainer(kind, loss, args, max_tokens)
    before = weights(trainer.model).clone()
    trainer.train()
    return weights(trainer.model), (weights(trainer.model) - before).abs().max().item()


def train_all(_rank: int, *, folder: str, cuts: tuple[str, ...]) -> dict:
    """{loss: {cut: (weights, largest change of a weight by training)}}."""
    return {
        name: {cut: train(kind, loss, Path(folder) / name, **CUTS[cut]) for cut in cuts}
        for name, (kind, loss) in losses().items()
    }
