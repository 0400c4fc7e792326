"""A tiny vision-language model with its real image processor, and made images.

folder = save_model(tmp_path / "model")              # Qwen3-VL, two layers of vision and of text
path = save_image(tmp_path / "a.png", (40, 24), seed=1)
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

PLAIN = ["<unk>", "user", "assistant", "system", *map(str, range(100))]
SPECIAL = ["<|im_end|>", "<|im_start|>", "<|vision_start|>", "<|vision_end|>"]
SPECIAL += ["<|image_pad|>", "<|video_pad|>"]
WORDS = [*PLAIN, *SPECIAL]
EOS, IMAGE_ID, VIDEO_ID = map(WORDS.index, ("<|im_end|>", "<|image_pad|>", "<|video_pad|>"))
SIZES = ((40, 24), (24, 56), (64, 16), (33, 47))  # width and height in pixels

CHAT = (
    "{% for turn in messages %}<|im_start|> {{ turn.role }} "
    "{% if turn.content is string %}{{ turn.content }}{% else %}{% for part in turn.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %} <|im_end|> {% endfor %}"
    "{% if add_generation_prompt %}<|im_start|> assistant {% endif %}"
)
TEXT = {
    "vocab_size": len(WORDS),
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "eos_token_id": EOS,
    "pad_token_id": 0,
    "bos_token_id": None,
    "initializer_range": 0.2,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "mrope_section": [2, 1, 1],
        "mrope_interleaved": True,
    },
}
VISION = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 4,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "out_hidden_size": 32,
    "num_position_embeddings": 64,
    "deepstack_visual_indexes": [0, 1],
    "initializer_range": 0.2,
}


def make_tokenizer(chat_template: str = CHAT, **named: str):
    """Every token is a word: a number, a role or a special token; some have a name as well."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    ids = {word: place for place, word in enumerate(PLAIN)}
    words = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.add_special_tokens(SPECIAL)  # in this order
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        eos_token="<|im_end|>",
        pad_token="<unk>",
        additional_special_tokens=SPECIAL[1:],
        **({"extra_special_tokens": named} if named else {}),
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def make_config():
    """The config of a tiny Qwen3-VL."""
    from transformers import AutoConfig

    names = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id")
    ids = {name: WORDS.index(word) for name, word in zip(names, SPECIAL[2:], strict=True)}
    return AutoConfig.for_model("qwen3_vl", text_config=TEXT, vision_config=VISION, **ids)


def save_model(folder: Path, *, seed: int = 0) -> Path:
    """Write a tiny Qwen3-VL with its tokenizer and image processor."""
    from transformers import AutoModelForImageTextToText, Qwen2VLImageProcessorPil

    torch.manual_seed(seed)
    AutoModelForImageTextToText.from_config(make_config()).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    Qwen2VLImageProcessorPil(
        patch_size=4, merge_size=2, size={"shortest_edge": 64, "longest_edge": 1600}
    ).save_pretrained(folder)
    return folder


def make_start(folder: Path):
    """The model as it was saved, by transformers alone."""
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(folder).eval()


def save_image(path: Path, size: tuple[int, int], *, seed: int = 0) -> Path:
    """Write an image of random colours."""
    from PIL import Image

    width, height = size
    pixels = torch.randint(256, (height, width, 3), generator=torch.Generator().manual_seed(seed))
    Image.fromarray(pixels.to(torch.uint8).numpy()).save(path)
    return path


def ask(text: str, images: int = 1) -> dict:
    """A user's turn that shows images before its text."""
    parts = [{"type": "image"}] * images
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


def answer(text: str) -> dict:
    """An assistant's turn."""
    return {"role": "assistant", "content": text}


def write_rows(path: Path, rows: list[dict]) -> Path:
    """Write a JSONL file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
