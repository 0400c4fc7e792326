"""One forward of a packed batch: what a model is called with, and the scores that come back.

    scores = packed_logps(model, batch, temperature=1.0, with_entropy=True)
    logps = batch.dense(scores.logps)                # (B, T)

The layout goes to attention as the keyword argument `packed`, the targets go to the LM head beside
the model's arguments (posttrain.packed.head), so any wrapper around the model passes both on.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from posttrain.errors import ConfigError
from posttrain.packed import attention
from posttrain.packed.batch import Layout, PackedBatch, Segment, pack
from posttrain.packed.half import hold_in_half
from posttrain.packed.head import TokenScores, install_scoring_head, requesting_scores
from posttrain.run.options import say

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, TrainingArguments


def packed_inputs(batch: PackedBatch) -> dict[str, Tensor | Layout | bool]:
    """Arguments for a forward of a packed batch, whichever head it ends in."""
    # A ready-made 4-D mask makes transformers build none; packed attention never reads it. It is
    # made on the device: a copy from the host would stand in the queue of every forward.
    no_mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=batch.input_ids.device)
    return {
        "input_ids": batch.input_ids,
        "attention_mask": no_mask,
        "position_ids": batch.position_ids,
        "packed": batch.layout,
        "use_cache": False,
    }


def packed_logps(
    model: nn.Module,
    batch: PackedBatch,
    *,
    temperature: float = 1.0,
    with_entropy: bool = False,
    entropy_gradient: bool = True,
    equal_slopes: bool = False,
) -> TokenScores:
    """Run one forward of a packed batch and return the scores of its S scored tokens.

    Args:
        model: a causal LM that posttrain.packed.forward has made ready, bare or wrapped by DDP,
            DeepSpeed, FSDP or PEFT.
        temperature: logits are divided by it, as in sampling.
        with_entropy: also compute entropies, and which tokens are the most likely ones.
        entropy_gradient: False where entropies are only logged, and the loss has no term of them.
        equal_slopes: see posttrain.packed.head.chunked_logps.
    """
    wanted = {
        "temperature": temperature,
        "with_entropy": with_entropy,
        "entropy_gradient": entropy_gradient,
        "equal_slopes": equal_slopes,
    }
    with requesting_scores(batch, **wanted):
        output = model(**packed_inputs(batch), logits_to_keep=batch.predictors)
    return TokenScores(*output.logits[0].unbind(-1))


# Nats by which a packed and a plain forward may differ: float32 sums in another order. A leak
# changes the log-probs of a random model by about 1e-2, of a trained one by much more.
TOLERANCE = 1e-3
# Names under which configs of different families keep the dropout of attention probabilities.
ATTENTION_DROPOUT = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob")


def prepare(
    model: nn.Module,
    *,
    attn_implementation: str = "auto",
    device: torch.device | None = None,
    half: bool = False,
) -> str:
    """Give `model` packed attention and the scoring head, and return the kernel's name.

    Args:
        attn_implementation: one of posttrain.packed.attention.CHOICES.
        device: where it will train, by default where it is.
        half: whether forwards will run in half precision (autocast), which CUDA kernels need.

    Raises:
        ConfigError: for a model whose attention packing does not serve exactly, or if the
            requested kernel is not available.
    """
    _check_attention(model)
    parameter = next(model.parameters())
    device = device or parameter.device
    kernel = attention.choose_kernel(
        attn_implementation, device=device, dtype=torch.bfloat16 if half else parameter.dtype
    )
    attention.register()
    switch_off_dropout(model)
    install_scoring_head(model)
    # The model in float32 with the kernel that is exact everywhere, then the kernel by itself.
    model.set_attn_implementation(f"{attention.PREFIX}sdpa")
    check_exact(model)
    if kernel != "sdpa":
        attention.check_kernel(kernel, device=device, **heads_of(model))
        model.set_attn_implementation(attention.PREFIX + kernel)
    return kernel


def switch_off_dropout(model: nn.Module) -> None:
    """Set every dropout of the model to 0: policy, reference and sampler must be one function.

    An adapter that is added later keeps its own.
    """
    dropped = [m for m in model.modules() if isinstance(m, nn.Dropout) and m.p > 0]
    for module in dropped:
        module.p = 0.0
    if dropped:
        say(f"dropout of the model's config is off, in {len(dropped)} layers")


def heads_of(model: nn.Module) -> dict[str, int]:
    """Return num_heads, num_kv_heads and head_dim of the model's attention."""
    config = model.config
    num_heads = config.num_attention_heads
    return {
        "num_heads": num_heads,
        "num_kv_heads": getattr(config, "num_key_value_heads", None) or num_heads,
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // num_heads,
    }


def is_prepared(model: nn.Module) -> bool:
    """True if `prepare` has been called on this (PEFT-wrapped or bare) model."""
    return str(model.config._attn_implementation).startswith(attention.PREFIX)


def prepare_once(model: nn.Module, *, half: bool) -> None:
    """Call `prepare`, unless it has been called."""
    if not is_prepared(model):
        prepare(model, half=half)


def frozen_copy(model: nn.Module, device: torch.device, *, half: bool = False) -> nn.Module | None:
    """Copy a model that is about to train, to be its reference.

    Returns None for a model with an adapter, which is switched off instead. half: forwards will
    run in bfloat16 autocast; the copy's linear layers are then held in bfloat16, at half the
    memory and with the same results.
    """
    if hasattr(model, "disable_adapter"):
        return None
    copied = copy.deepcopy(model).requires_grad_(False).eval()
    if half:
        hold_in_half(copied)
    return copied.to(device)


def _check_attention(model: nn.Module) -> None:
    """Refuse what is known not to be served, with the reason; check_exact finds the rest."""
    name, config = type(model).__name__, model.config
    dropout = {n: p for n in ATTENTION_DROPOUT if (p := getattr(config, n, 0.0))}
    if dropout:
        settings = ", ".join(f"{setting} = {share:g}" for setting, share in dropout.items())
        raise ConfigError(
            f"{name} drops attention probabilities in training ({settings}), which packed "
            "attention does not do. Set it to 0 in the model's config.json."
        )
    problem = None
    if getattr(config, "is_encoder_decoder", False):
        problem = "it is an encoder-decoder"
    elif not getattr(model, "_supports_attention_backend", False):
        problem = "its attention does not go through transformers' attention interface"
    elif getattr(config, "attn_logit_softcapping", None):
        problem = "it caps its attention scores (attn_logit_softcapping)"
    elif any("sinks" in parameter for parameter, _ in model.named_parameters()):
        problem = "it has attention sinks"
    else:
        kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
        kinds -= {"full_attention", "sliding_attention"}
        if kinds:
            problem = f"it has layers of the kind {', '.join(sorted(kinds))}"
    if problem:
        raise ConfigError(
            f"{name} cannot be trained on packed batches: {problem}. Supported are decoders with "
            "full causal attention, such as Llama, Qwen2, Qwen3, Mistral and Gemma."
        )


def check_context(model: nn.Module, num_tokens: int, remedy: str) -> None:
    """Refuse sequences beyond the model's positions or window with a ConfigError.

    num_tokens: of the longest sequence. remedy: a sentence that says which setting to lower.
    """
    config = model.config
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") in ("longrope", "dynamic"):
        short = rope.get("original_max_position_embeddings") or config.max_position_embeddings
        if num_tokens > short:
            raise ConfigError(
                f"the longest sequence has {num_tokens:,} tokens, and beyond {short:,} the "
                f"{rope['rope_type']} positions of {type(model).__name__} depend on the longest "
                f"sequence of a batch, which packing does not serve. {remedy}"
            )
    limits = {
        "positions (max_position_embeddings)": getattr(config, "max_position_embeddings", None),
        "sliding window, beyond which packed attention is not exact": getattr(
            config, "sliding_window", None
        ),
    }
    for name, limit in limits.items():
        if limit and num_tokens > limit:
            raise ConfigError(
                f"the longest sequence has {num_tokens:,} tokens, and {type(model).__name__} has "
                f"{limit:,} {name}. {remedy}"
            )


@torch.no_grad()
def check_exact(model: nn.Module) -> None:
    """Score two completions packed behind a shared prompt and each alone, and compare.

    Whatever a model does that packing does not know of (its own masks, recurrent layers, position
    schemes) shows here, before training. Parameters that are not materialised skip the check.
    Raises ConfigError where the log-probs differ.
    """
    parameter = next(model.parameters())
    if parameter.is_meta or hasattr(parameter, "ds_id"):
        return
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = torch.arange(1, 17).mul(7919).remainder(vocabulary).tolist()
    prompt, completions = ids[:6], (ids[6:9], ids[9:16])
    training = model.training
    model.eval()
    device = parameter.device

    def score(*siblings: list[int]) -> torch.Tensor:
        segments = [Segment(prompt)]
        segments += [Segment(c, 0, scored=[True] * len(c), row=i) for i, c in enumerate(siblings)]
        return packed_logps(model, pack(segments, num_rows=len(siblings), device=device)).logps

    first, second = completions
    together = score(first, second)
    plain = model(torch.tensor([prompt + second], device=device), use_cache=False).logits[0]
    alone = torch.cat([score(first), _plain_logps(plain, len(prompt), second)])
    model.train(training)
    gap = (together - alone).abs().max().item()
    half = parameter.dtype in (torch.bfloat16, torch.float16)  # coarse hidden states
    if not gap <= (100 * TOLERANCE if half else TOLERANCE):
        raise ConfigError(
            f"{type(model).__name__} cannot be trained on packed batches: log-probs of a packed "
            f"batch differ from those of its sequences run alone by {gap:.2g} nats."
        )


def _plain_logps(logits: torch.Tensor, prompt_length: int, completion: list[int]) -> torch.Tensor:
    log_probs = logits[prompt_length - 1 : -1].float().log_softmax(-1)
    return log_probs.gather(-1, torch.tensor(completion, device=logits.device)[:, None]).squeeze(-1)


def check_vocabulary(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer with ids that the model has no embedding of."""
    rows = model.get_input_embeddings().num_embeddings
    if tokenizer is not None and len(tokenizer) > rows:
        raise ConfigError(
            f"the tokenizer has {len(tokenizer):,} tokens, and the model's embedding {rows:,} rows "
            f"(--model_name_or_path). The tokens added last, such as "
            f"{tokenizer.convert_ids_to_tokens(len(tokenizer) - 1)!r}, have none. Resize the model "
            "with resize_token_embeddings and save it, or take its own tokenizer."
        )


def check_precision(model: nn.Module, args: TrainingArguments) -> None:
    """Refuse a half-precision attention kernel under float32 weights without autocast."""
    kernel = str(model.config._attn_implementation)
    is_half = args.bf16 or args.fp16 or next(model.parameters()).dtype != torch.float32
    if not kernel.endswith("sdpa") and not is_half:
        raise ConfigError(
            f"the model was prepared with {kernel}, which computes in half precision, and the "
            "training arguments say float32. Set bf16=True, or load the model with "
            "--dtype float32."
        )


@torch.no_grad()
def is_finite(values: Tensor) -> bool:
    """True if no number is NaN or infinite; without a copy of the size of `values`."""
    return values.numel() == 0 or all(bool(x.isfinite()) for x in torch.aminmax(values.detach()))
