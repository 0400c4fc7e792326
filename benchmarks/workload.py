"""Make the inputs of benchmarks: a model of random weights, and examples of realistic lengths.

    folder = model_folder(SIZES["small"], data=None)        # weights and tokenizer, kept in runs/
    documents = made_documents(64, vocabulary=16384, seed=0)

Examples come from a file, tokenised by a byte-level BPE that is trained on that file, or are made
up: random tokens whose numbers have the quantiles of GSM8K and HH-RLHF under such a tokenizer.
"""

import hashlib
import json
import math
import random
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

ROOT = Path("runs/benchmarks")
EOS, PAD = "<|end|>", "<|pad|>"
EOS_ID, PAD_ID = 0, 1
POSITIONS = 4096
MOST_MERGED = 16_384  # vocabulary of the tokenizer, even where the model's is larger


@dataclass(frozen=True)
class Size:
    """The size of a LLaMA or of another family: heads of 64 (tiny: 32), tied embeddings.

    experts: feed-forward parts that a token goes through. group: query heads that share a key head.
    Operations are counted as a LLaMA's.
    """

    name: str
    vocabulary: int
    hidden: int
    intermediate: int
    layers: int
    head: int = 64
    family: str = "llama"
    experts: int = 1
    group: int = 1

    @property
    def linear_parameters(self) -> int:
        """Weights of the layers' products, without embeddings and head."""
        feed_forward = 3 * self.hidden * self.intermediate * self.experts
        attention = 2 * self.hidden**2 + 2 * self.hidden**2 // self.group
        return self.layers * (attention + feed_forward)


SIZES = {
    "tiny": Size("tiny", 4_096, 128, 384, 2, head=32),  # 0.9M parameters
    "small": Size("small", 16_384, 512, 1_280, 8),  # 32M
    "smollm2": Size("smollm2", 49_152, 576, 1_536, 30, group=3),  # SmolLM2's shapes, 135M
    "base": Size("base", 128_000, 768, 2_048, 9),  # 162M
    "1b": Size("1b", 128_256, 2_048, 8_192, 16, group=4),  # 1.2B, as LLaMA 3.2 1B has
    "qwen3_5": Size("qwen3_5", 4_096, 256, 768, 4, family="qwen3_5_text"),
    "gpt_oss": Size("gpt_oss", 4_096, 256, 256, 4, family="gpt_oss", experts=2),
}
LAYERS = {
    "qwen3_5_text": {
        "layer_types": [*["linear_attention"] * 3, "full_attention"],
        "linear_key_head_dim": 64,
        "linear_value_head_dim": 64,
        "linear_num_key_heads": 4,
        "linear_num_value_heads": 4,
    },
    "gpt_oss": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "sliding_window": 128,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
}


@dataclass(frozen=True)
class Lengths:
    """Tokens, by a 16k BPE, at the quantiles 5, 50, 95 and 100 % of a public data set."""

    low: int
    median: int
    high: int
    longest: int

    def at(self, share: float) -> int:
        """Return the length below which this share of all texts lies.

        Log-length is linear in the normal score between the known quantiles; the longest is one
        text in 2,000.
        """
        known = ((0.05, self.low), (0.5, self.median), (0.95, self.high), (0.9995, self.longest))
        points = [(NormalDist().inv_cdf(p), math.log(n)) for p, n in known]
        score = NormalDist().inv_cdf(share)
        first = 0 if score < 0 else 1 if score < points[2][0] else 2
        (x0, y0), (x1, y1) = points[first], points[first + 1]
        length = math.exp(y0 + (score - x0) * (y1 - y0) / (x1 - x0))
        return min(max(1, round(length)), self.longest)

    def sample(self, dice: random.Random) -> int:
        """Sample a length."""
        return self.at(dice.uniform(1e-6, 1 - 1e-6))


GSM8K_QUESTION, GSM8K_ANSWER = Lengths(29, 51, 94, 213), Lengths(42, 84, 172, 332)
HH_PROMPT = Lengths(16, 95, 343, 834)
HH_CHOSEN, HH_REJECTED = Lengths(6, 27, 119, 268), Lengths(6, 36, 145, 562)


def made_documents(count: int, *, vocabulary: int, seed: int = 0) -> list[dict]:
    """Make documents with GSM8K's lengths; the answer is trained, and ends in EOS."""
    dice = random.Random(seed)
    documents = []
    for _ in range(count):
        question, answer = GSM8K_QUESTION.sample(dice), GSM8K_ANSWER.sample(dice)
        ids = _tokens(question, vocabulary, dice) + _completion(answer, vocabulary, dice)
        documents.append({"input_ids": ids, "trained": [False] * question + [True] * answer})
    return documents


def made_pairs(count: int, *, vocabulary: int, seed: int = 0) -> list[dict]:
    """Make preference pairs with HH-RLHF's lengths; each completion ends in EOS."""
    dice = random.Random(seed)
    return [
        {
            "prompt_ids": _tokens(HH_PROMPT.sample(dice), vocabulary, dice),
            "chosen_ids": _completion(HH_CHOSEN.sample(dice), vocabulary, dice),
            "rejected_ids": _completion(HH_REJECTED.sample(dice), vocabulary, dice),
        }
        for _ in range(count)
    ]


def _tokens(count: int, vocabulary: int, dice: random.Random) -> list[int]:
    return [dice.randrange(2, vocabulary) for _ in range(count)]


def _completion(count: int, vocabulary: int, dice: random.Random) -> list[int]:
    return [*_tokens(count - 1, vocabulary, dice), EOS_ID]


def read_documents(source: str, tokenizer: Any) -> list[dict]:
    """Read documents of a file that posttrain can read, with prompts as they are in the file."""
    from posttrain.data import load_documents

    settings = {"template": "plain", "max_length": POSITIONS, "say": _silent}
    return list(load_documents(source, tokenizer, **settings))


def read_pairs(source: str, tokenizer: Any) -> list[dict]:
    """Read preference pairs of a file that posttrain can read."""
    from posttrain.data import load_pairs

    settings = {"template": "plain", "max_length": POSITIONS, "say": _silent}
    return list(load_pairs(source, tokenizer, **settings))


def _silent(_line: str) -> None:
    """Print nothing: the report on a file does not belong into a benchmark's output."""


def read_or_made(
    read: Callable[[str, Any], list[dict]], make: Callable[..., list[dict]]
) -> Callable[[int, Any, Size, Path], list[dict]]:
    """Return f(count, config, size, model folder) -> examples of `config.data`, or made-up ones."""

    def examples(count: int, config: Any, size: Size, folder: Path) -> list[dict]:
        if config.data is None:
            return make(count, vocabulary=size.vocabulary, seed=config.seed)
        from posttrain.models.load import load_tokenizer

        rows = read(config.data, load_tokenizer(str(folder)))
        return shuffled(rows, count, seed=config.seed)

    return examples


def shuffled(rows: list[dict], count: int, *, seed: int) -> list[dict]:
    """Return `count` rows in random order, from the beginning again where there are too few."""
    order = random.Random(seed).sample(range(len(rows)), len(rows))
    return [rows[order[i % len(order)]] for i in range(count)]


def model_folder(size: Size, data: str | None, *, seed: int = 0) -> Path:
    """Return a folder with random weights and a tokenizer, made at the first call.

    Args:
        data: The file whose text the tokenizer is trained on; None makes a word of each token.
    """
    key = {**asdict(size), "seed": seed, "data": data and _digest(data)}
    name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:8]
    folder = ROOT / "models" / f"{size.name}-{name}"
    if not (folder / "config.json").is_file():
        unfinished = folder.with_name(f"{folder.name}.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        _save_tokenizer(size, data, unfinished)
        _save_model(size, unfinished, seed)
        unfinished.rename(folder)
    return folder


def _digest(data: str) -> str:
    return hashlib.sha256(Path(data).read_bytes()).hexdigest()


def _save_tokenizer(size: Size, data: str | None, folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    if data is None:
        words = {EOS: EOS_ID, PAD: PAD_ID} | {f"w{i}": i for i in range(2, size.vocabulary)}
        tokenizer = Tokenizer(models.WordLevel(words, unk_token=PAD))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    else:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=min(size.vocabulary, MOST_MERGED),
            special_tokens=[EOS, PAD],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(_texts(data), trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, pad_token=PAD)
    fast.save_pretrained(folder)


def _texts(data: str) -> list[str]:
    from posttrain.data import read_records

    values = (value for row in read_records(data) for value in row.values.values())
    return [value for value in values if isinstance(value, str)]


def _save_model(size: Size, folder: Path, seed: int) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from posttrain.run.engine import this_device

    torch.manual_seed(seed)
    heads = size.hidden // size.head
    config = AutoConfig.for_model(
        size.family,
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // size.group,
        head_dim=size.head,
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=True,
        eos_token_id=EOS_ID,
        pad_token_id=PAD_ID,
        bos_token_id=None,
        **LAYERS.get(size.family, {}),
    )
    with this_device():  # a GPU makes a billion random numbers in no time
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder)
