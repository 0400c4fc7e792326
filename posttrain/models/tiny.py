"""The tiny LLaMA of the tiny world: small enough to train from random weights on two cores."""

from typing import Any


def tiny_llama_config(tokenizer: Any):
    """A LlamaConfig of about 0.7M parameters for the tokenizer's vocabulary.

    Three layers of width 128, of which one finds the column, one copies its digits and one adds
    them; heads of 32, SwiGLU of 384, tied embeddings, contexts up to 512 tokens.
    """
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
