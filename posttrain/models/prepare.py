"""Making a causal LM ready for packed batches, and refusing one that packing cannot serve.

prepare(model, attn_implementation="auto")
"""

import torch
from torch import nn

from posttrain import attention
from posttrain.errors import ConfigError
from posttrain.logprobs import install_scoring_head, packed_logps
from posttrain.packing import Segment, pack

# float32 sums in another order; half precision differs in the third digit. A leak changes the
# log-probs of a random model by about 1e-2, of a trained one by much more.
HALF_TOLERANCE = 0.25
TOLERANCE = {
    torch.float64: 1e-6, torch.float32: 1e-3,
    torch.bfloat16: HALF_TOLERANCE, torch.float16: HALF_TOLERANCE,
}  # fmt: skip


def prepare(model: nn.Module, *, attn_implementation: str = "auto", half: bool = False) -> str:
    """Give `model` packed attention and the scoring head. Returns the kernel's name.

    half: whether forwards will run in half precision (autocast), which CUDA kernels need.
    Raises ConfigError for a model whose attention is not served exactly, or a kernel that is not
    to be had.
    """
    _check_attention(model)
    parameter = next(model.parameters())
    device, dtype = parameter.device, torch.bfloat16 if half else parameter.dtype
    kernel = attention.choose_kernel(attn_implementation, device=device, dtype=dtype)
    attention.register()
    model.set_attn_implementation(attention.PREFIX + kernel)
    install_scoring_head(model)
    with torch.autocast(device.type, torch.bfloat16, enabled=half):
        check_exact(model, tolerance=HALF_TOLERANCE if half else TOLERANCE[dtype])
    return kernel


def is_prepared(model: nn.Module) -> bool:
    """Whether `prepare` has been called on this (PEFT-wrapped or bare) model."""
    return str(model.config._attn_implementation).startswith(attention.PREFIX)


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


@torch.no_grad()
def check_exact(model: nn.Module, *, tolerance: float) -> None:
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
    if not gap <= tolerance:
        raise ConfigError(
            f"{type(model).__name__} cannot be trained on packed batches: log-probs of a packed "
            f"batch differ from those of its sequences run alone by {gap:.2g} nats."
        )


def _plain_logps(logits: torch.Tensor, prompt_length: int, answer: list[int]) -> torch.Tensor:
    log_probs = logits[prompt_length - 1 : -1].float().log_softmax(-1)
    return log_probs.gather(-1, torch.tensor(answer, device=logits.device)[:, None]).squeeze(-1)
