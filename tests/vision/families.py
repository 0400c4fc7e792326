"""Tiny models of other families of vision-language models, each with its own image processor."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tests.vision.tiny import CHAT, IMAGE_ID, SPECIAL, TEXT, VISION, WORDS, make_tokenizer

START, END, IMAGE, VIDEO = SPECIAL[2:]
IDS = {
    "vision_start_token_id": WORDS.index(START),
    "vision_end_token_id": WORDS.index(END),
    "image_token_id": IMAGE_ID,
    "video_token_id": WORDS.index(VIDEO),
}
QWEN = {"patch_size": 4, "merge_size": 2, "size": {"shortest_edge": 64, "longest_edge": 1600}}
PLAIN_TEXT = {name: value for name, value in TEXT.items() if name != "rope_parameters"}
SMALL = {"hidden_size": 32, "intermediate_size": 48, "patch_size": 4, "num_attention_heads": 4}


@dataclass(frozen=True)
class Family:
    """What makes a family's tiny model, beside its config's name.

    named: names that its processor knows tokens by. processor: settings of its own.
    """

    text: dict[str, Any]
    vision: dict[str, Any]
    config: dict[str, Any]
    image_processor: str
    image_settings: dict[str, Any]
    named: dict[str, str] = field(default_factory=dict)
    processor: dict[str, Any] = field(default_factory=dict)
    chat: str = CHAT


def family_of(name: str) -> Family:
    """The settings of one family."""
    if name == "qwen2_5_vl":
        rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
        vision = {name: VISION[name] for name in VISION if name not in QWEN3_ONLY}
        vision |= {"window_size": 16, "fullatt_block_indexes": [1]}
        text = PLAIN_TEXT | {"rope_parameters": rope}
        return Family(text, vision, IDS, "Qwen2VLImageProcessorPil", QWEN)
    if name == "qwen3_vl_moe":
        text = TEXT | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
        return Family(text, VISION, IDS, "Qwen2VLImageProcessorPil", QWEN)
    if name == "gemma3":
        ids = {"image_token_id": IMAGE_ID, "mm_tokens_per_image": 4}
        ids |= {"boi_token_index": WORDS.index(START), "eoi_token_index": WORDS.index(END)}
        named = {"boi_token": START, "eoi_token": END, "image_token": IMAGE}
        return Family(
            PLAIN_TEXT | {"sliding_window": 64},
            SMALL | {"num_hidden_layers": 2, "image_size": 16},
            ids,
            "Gemma3ImageProcessorPil",
            {"size": {"height": 16, "width": 16}},
            named,
            {"image_seq_length": 4},
            CHAT.replace(START + IMAGE + END, START),
        )
    return Family(
        DEEPSEEK,
        SMALL | {"num_hidden_layers": 2, "pos_emb_height": 8, "pos_emb_width": 8},
        IDS | {"projection_hidden_size": 32, "tie_word_embeddings": False},
        "Kimi_K25ImageProcessor",
        {"patch_size": 4, "merge_size": 2},
        {"image_token": IMAGE, "video_token": VIDEO},
    )


QWEN3_ONLY = ("deepstack_visual_indexes", "num_position_embeddings")
DEEPSEEK = PLAIN_TEXT | {
    "model_type": "deepseek_v3",
    "num_key_value_heads": 4,
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
del DEEPSEEK["head_dim"]


def save_family(folder: Path, name: str) -> Path:
    """Write a tiny random model of a family, with its tokenizer and image processor."""
    import transformers

    family = family_of(name)
    config = transformers.AutoConfig.for_model(
        name, text_config=family.text, vision_config=family.vision, **family.config
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForImageTextToText.from_config(config)
    for weight in model.parameters():
        if weight.dim() > 1:  # towers have no initializer_range, and would be flat
            torch.nn.init.normal_(weight, std=0.2)
    model.save_pretrained(folder)
    make_tokenizer(family.chat, **family.named).save_pretrained(folder)
    getattr(transformers, family.image_processor)(**family.image_settings).save_pretrained(folder)
    if family.processor:
        (folder / "processor_config.json").write_text(json.dumps(family.processor))
    return folder
