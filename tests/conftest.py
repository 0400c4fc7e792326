"""Fakes instead of downloads: tiny random models and a tokenizer whose tokens are numbers."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DS_ACCELERATOR", "cpu")

import gc
import importlib
import random
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

torch.set_num_threads(1)  # tiny tensors: a second thread costs more than it brings


def pytest_addoption(parser):
    parser.addoption("--every-kind", action="store_true", help="every trainer in every engine")


@pytest.fixture(scope="module", autouse=True)
def leave_out_what_is_loaded():
    """Leave what is there by now, torch and transformers above all, out of garbage collections.

    accelerate collects after each training; with all of them among the objects, that costs as
    much as a tiny training itself.
    """
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def reports_of_nothing():
    """Leave out the report at the end of each run, but in the tests that are about it."""
    with patch("posttrain.report.COMMAND", ("true",)):
        yield


VOCABULARY = 97
EOS = 1
SHARED = Path(__file__).parents[2] / "shared"

TINY = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "eos_token_id": EOS,
    "pad_token_id": 0,
    "bos_token_id": None,
    # The default 0.02 makes a model so flat that leaks and errors drown in rounding.
    "initializer_range": 0.2,
}


def make_model(family: str = "llama", *, seed: int = 0, **settings) -> torch.nn.Module:
    """A tiny random causal LM of a Hugging Face family, e.g. qwen3."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **{**TINY, **settings})
    return AutoModelForCausalLM.from_config(config).eval()


def count_chunks(monkeypatch) -> list:
    """Chunks of logits that the LM head computes from now on, as a list that grows."""
    from posttrain.packed import head as logprobs

    calls, plain = [], logprobs._logits
    monkeypatch.setattr(logprobs, "_logits", lambda *inputs: calls.append(1) or plain(*inputs))
    return calls


def random_ids(count: int, generator: random.Random) -> list[int]:
    """Token ids that are neither padding nor end-of-sequence."""
    return [generator.randrange(2, VOCABULARY) for _ in range(count)]


def make_tokenizer():
    """Token i is the word "i"."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({str(i): i for i in range(VOCABULARY)}, unk_token="0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="1", pad_token="0")


@pytest.fixture
def number_tokenizer():
    """`make_tokenizer` as a fixture."""
    return make_tokenizer()


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """A folder with `make_model` and `make_tokenizer`, to be read only."""
    folder = tmp_path_factory.mktemp("base")
    make_model().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def logps_alone(model: torch.nn.Module, prompt: list[int], answers: list[list[int]]):
    """Log-probs of the answers' tokens, by an ordinary forward of each with its prompt."""
    found = []
    for answer in answers:
        logits = model(input_ids=torch.tensor([prompt + answer]), use_cache=False).logits[0]
        logps = logits.log_softmax(-1)[len(prompt) - 1 : -1]
        found.append(logps.gather(1, torch.tensor(answer)[:, None])[:, 0])
    return torch.cat(found)


def policy_from(folder, *, seed: int = 0) -> torch.nn.Module:
    """A prepared policy that vLLM loads from `folder`, with other weights where seed is not 0."""
    from posttrain.packed.prepare import prepare

    model = make_model(seed=seed)
    model.name_or_path = str(folder)
    prepare(model)
    return model


@pytest.fixture
def fake_vllm(monkeypatch):
    """tests/fakes/vllm as the package vllm, and TRL's own generation modules loaded over it."""

    def loaded():
        return [n for n in sys.modules if n.split(".")[0] == "vllm" or n.startswith("trl.generat")]

    monkeypatch.syspath_prepend(Path(__file__).parent / "fakes")
    others = {name: sys.modules.pop(name) for name in loaded()}
    with patch.dict(os.environ):  # TRL tells vLLM its rank there
        yield importlib.import_module("vllm")
    for name in loaded():
        del sys.modules[name]
    sys.modules.update(others)
