"""The tiny LLaMA of the tiny world: small enough to train from random weights on two cores."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import LlamaConfig, PreTrainedTokenizerBase


def tiny_llama_config(tokenizer: PreTrainedTokenizerBase, *, hidden_size: int = 128) -> LlamaConfig:
    """Return a LlamaConfig of about 0.5M parameters for the tokenizer's vocabulary.

    Two layers of width 128 (heads of 32, SwiGLU of 384, tied embeddings), contexts up to 1,024
    tokens. Two settings let so small a model learn in a few hundred steps: initial weights four
    times the usual size, without which attention takes long to leave uniform, and a rotary base
    of 100, whose wavelengths fit texts of some dozens of tokens. Another `hidden_size`, a multiple
    of 32, keeps these proportions.
    """
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=2,
        num_attention_heads=hidden_size // 32,
        num_key_value_heads=hidden_size // 32,
        max_position_embeddings=1024,
        initializer_range=0.08,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
