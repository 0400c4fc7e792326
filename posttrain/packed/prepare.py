"""Making a causal LM ready for packed batches, and refusing one that packing cannot serve.

prepare(model, attn_implementation="auto")
"""

import copy

import torch
from torch import nn

from posttrain.errors import ConfigError
from posttrain.packed import attention
from posttrain.packed.batch import Segment, pack
from posttrain.packed.forward import packed_logps
from posttrain.packed.head import install_scoring_head

# float32 sums in another order; a leak changes the log-probs of a random model by about 1e-2, of a
# trained one by much more.
TOLERANCE = 1e-3


def prepare(
    model: nn.Module,
    *,
    attn_implementation: str = "auto",
    device: torch.device | None = None,
    half: bool = False,
) -> str:
    """Give `model` packed attention and the scoring head. Returns the kernel's name.

    device: where it will train, by default where it is. half: whether forwards will run in half
    precision (autocast), which CUDA kernels need. Raises ConfigError for a model whose attention
    is not served exactly, or a kernel that is not to be had.
    """
    _check_attention(model)
    parameter = next(model.parameters())
    kernel = attention.choose_kernel(
        attn_implementation,
        device=device or parameter.device,
        dtype=torch.bfloat16 if half else parameter.dtype,
    )
    attention.register()
    install_scoring_head(model)
    # The model in float32 with the kernel that is exact everywhere, then the kernel by itself.
    model.set_attn_implementation(f"{attention.PREFIX}sdpa")
    check_exact(model)
    if kernel != "sdpa":
        attention.check_kernel(kernel, device=device or parameter.device)
        model.set_attn_implementation(attention.PREFIX + kernel)
    return kernel


def is_prepared(model: nn.Module) -> bool:
    """Whether `prepare` has been called on this (PEFT-wrapped or bare) model."""
    return str(model.config._attn_implementation).startswith(attention.PREFIX)


def prepare_once(model: nn.Module, *, half: bool) -> None:
    """`prepare`, unless it has been called."""
    if not is_prepared(model):
        prepare(model, half=half)


def frozen_copy(model: nn.Module, device: torch.device) -> nn.Module | None:
    """The reference of a model that is about to train; None with an adapter, which is switched off
    instead."""
    if hasattr(model, "disable_adapter"):
        return None
    return copy.deepcopy(model).requires_grad_(False).eval().to(device)


def _check_attention(model: nn.Module) -> None:
    """Refuse what is known not to be served, with the reason. check_exact finds the rest."""
    name, config = type(model).__name__, model.config
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
    """Refuse sequences beyond the model's positions or window; `remedy` says what to lower."""
    config = model.config
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
    """Score two answers packed behind a shared prompt and each alone: the log-probs must agree.

    Whatever a model does that packing does not know of (its own masks, recurrent layers, position
    schemes) shows here, before training. Parameters that are not materialised skip the check.
    """
    parameter = next(model.parameters())
    if parameter.is_meta or hasattr(parameter, "ds_id"):
        return
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = torch.arange(1, 17).mul(7919).remainder(vocabulary).tolist()
    prompt, answers = ids[:6], (ids[6:9], ids[9:16])
    training = model.training
    model.eval()
    device = parameter.device

    def score(*siblings: list[int]) -> torch.Tensor:
        segments = [Segment(prompt)]
        segments += [Segment(a, 0, scored=[True] * len(a), row=i) for i, a in enumerate(siblings)]
        return packed_logps(model, pack(segments, num_rows=len(siblings), device=device)).logps

    together = score(*answers)
    plain = model(torch.tensor([prompt + answers[1]], device=device), use_cache=False).logits[0]
    alone = torch.cat([score(answers[0]), _plain_logps(plain, len(prompt), answers[1])])
    model.train(training)
    gap = (together - alone).abs().max().item()
    half = parameter.dtype in (torch.bfloat16, torch.float16)  # coarse weights, coarse sums
    if not gap <= (100 * TOLERANCE if half else TOLERANCE):
        raise ConfigError(
            f"{type(model).__name__} cannot be trained on packed batches: log-probs of a packed "
            f"batch differ from those of its sequences run alone by {gap:.2g} nats."
        )


def _plain_logps(logits: torch.Tensor, prompt_length: int, answer: list[int]) -> torch.Tensor:
    log_probs = logits[prompt_length - 1 : -1].float().log_softmax(-1)
    return log_probs.gather(-1, torch.tensor(answer, device=logits.device)[:, None]).squeeze(-1)
