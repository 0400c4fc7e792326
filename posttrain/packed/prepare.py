"""Make a model ready for packed batches, in the fastest way that is exact, or say why none is.

    kernel = prepare(model)              # a kernel's name, or "rows"

Packed, each prompt is computed once and nothing is padded; by rows (posttrain.packed.rows) each
sequence is computed as the model came. The model says itself what it takes: before anything is
replaced it scores two sequences, longer than every window, chunk and switch in its config; then the
replacement must give the same log-probs and gradients.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import get_args

import torch
from torch import Tensor, nn

from posttrain.errors import ConfigError
from posttrain.packed.batch import PackedBatch, Segment, pack
from posttrain.packed.cuda_kernels import FLASH_PACKAGES, KERNELS, check_kernel
from posttrain.packed.forward import (
    CALLERS,
    REGISTERED,
    attempted,
    computes_rows,
    heads_of,
    in_evaluation,
    install_scoring_head,
    packed_logps,
    register,
    switch_off_dropout,
)
from posttrain.packed.mixers import (
    mix_by_rows,
    mix_others,
    recurrent_mixers,
    say_how,
    undo_mixers,
)
from posttrain.packed.rows import compute_rows, undo_rows
from posttrain.run.engine import AMPERE
from posttrain.run.options import say
from posttrain.run.settings import Attention

CHOICES = get_args(Attention)
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
KINDS = {"full_attention", "sliding_attention", "chunked_attention"}
NO_INTERFACE = "its attention does not go through transformers' attention interface"


def prepare(
    model: nn.Module,
    *,
    attn_implementation: str = "auto",
    device: torch.device | None = None,
    half: bool = False,
    router_aux_loss_coef: float | None = None,
) -> str:
    """Give `model` packed attention, or rows, and the scoring head; return the kernel or "rows".

    Args:
        attn_implementation: one of CHOICES.
        device: where it will train, by default where it is.
        half: whether forwards will run in half precision (autocast), which CUDA kernels need.
        router_aux_loss_coef: of a mixture of experts, see posttrain.packed.router.

    Raises:
        ConfigError: for a model that neither serves exactly, and for a kernel that is not here.
    """
    if hasattr(model, "get_base_model"):  # below an adapter
        model = model.get_base_model()
    if computes_rows(model):
        undo_rows(model)
    if hasattr(model.base_model, "mixers"):
        undo_mixers(model)
    if any(getattr(model.config.get_text_config(), name, None) for name in EXPERTS):
        from posttrain.packed.router import RouterWatch

        if router_aux_loss_coef is None and hasattr(model, "routers"):  # prepared before
            router_aux_loss_coef = model.routers.coef
        model.routers = RouterWatch(model, router_aux_loss_coef)
    elif router_aux_loss_coef:
        raise ConfigError(f"--router_aux_loss_coef: {type(model).__name__} has no experts.")
    for config in (model.config, model.config.get_text_config()):
        if getattr(config, "output_router_logits", False):
            config.output_router_logits = False  # transformers' loss of them would want a mask
    probe = _Probe(model)
    switch_off_dropout(model)  # after the probe, which made some layers and has none
    install_scoring_head(model)
    problem = _why_not_packed(model, probe)
    if attn_implementation != "rows" and problem is None:
        kernel = _kernel_for(model, attn_implementation, device, half)
        problem = _pack(model, probe, kernel, device)
        if problem is None:
            return kernel
    if attn_implementation not in ("auto", "rows"):
        raise ConfigError(
            f"--attn_implementation {attn_implementation}: {type(model).__name__} cannot be "
            f"packed: {problem}. Use --attn_implementation auto."
        )
    compute_rows(model, padded=True)
    if failed := probe.compare(model):
        compute_rows(model, padded=False)
        failed = probe.compare(model)
    if failed:
        reasons = f"packed, {problem}; by rows, {failed}" if problem else failed
        raise ConfigError(f"{type(model).__name__} cannot be trained: {reasons}.")
    if problem:
        say(f"rows    each sequence is computed whole, its prompt included: {problem}")
    return "rows"


def _pack(model: nn.Module, probe: _Probe, kernel: str, device: torch.device | None) -> str | None:
    """Give the model packed attention; or leave it as it was and return why it is not exact."""
    before = model.config._attn_implementation
    register()
    # The model in float32 with the kernel that is exact everywhere, then the kernel by itself.
    model.set_attn_implementation(REGISTERED["sdpa"])
    problem = _mix(model, probe)
    if problem is not None:
        undo_mixers(model)
        model.set_attn_implementation(before)
    elif kernel != "sdpa":
        device = device or next(model.parameters()).device
        check_kernel(kernel, device=device, **heads_of(model))
        model.set_attn_implementation(REGISTERED[kernel])
    return problem


def _mix(model: nn.Module, probe: _Probe) -> str | None:
    """Let layers that know no layout run by rows, as few as make the model exact."""
    if any(isinstance(module, nn.Conv1d) for module in model.modules()):
        mix_by_rows(model, recurrent_mixers(model))
    token = CALLERS.set([])
    problem, callers = probe.compare(model), CALLERS.get()
    CALLERS.reset(token)
    if problem is not None and mix_others(model, callers):
        problem = probe.compare(model)
    if problem is not None and not getattr(model, "_supports_attention_backend", False):
        problem = NO_INTERFACE
    if problem is None and hasattr(model.base_model, "mixers"):
        say_how(model)
    return problem


def _why_not_packed(model: nn.Module, probe: _Probe) -> str | None:
    """The reason why a model is known not to take a packed row; the probe finds the others."""
    if getattr(model.config, "is_encoder_decoder", False):
        return "it is an encoder-decoder"
    if not probe.skipped:
        return None
    if not getattr(model, "_supports_attention_backend", False):
        return NO_INTERFACE
    kinds = set(getattr(model.config.get_text_config(), "layer_types", None) or ()) - KINDS
    return f"it has layers of the kind {', '.join(sorted(kinds))}" if kinds else None


def _kernel_for(model: nn.Module, requested: str, device: torch.device | None, half: bool) -> str:
    parameter = next(model.parameters())
    dtype = torch.bfloat16 if half else parameter.dtype
    kernel = choose_kernel(requested, device=device or parameter.device, dtype=dtype)
    config, needs = model.config.get_text_config(), []
    if any(name.endswith("sinks") for name, _ in model.named_parameters()):
        needs.append("attention sinks")
    if getattr(config, "attention_chunk_size", None):
        needs.append("chunked attention")
    if getattr(config, "attn_logit_softcapping", None) and kernel == "varlen":
        needs.append("capped scores")
    if not needs or kernel == "sdpa":
        return kernel
    if requested != "auto":
        raise ConfigError(
            f"--attn_implementation {requested}: it has no {' and no '.join(needs)}, which "
            f"{type(model).__name__} needs. Usable here: auto, sdpa."
        )
    return "sdpa"


def is_prepared(model: nn.Module) -> bool:
    """True if `prepare` has been called on this (PEFT-wrapped or bare) model."""
    registered = set(REGISTERED.values())
    return computes_rows(model) or str(model.config._attn_implementation) in registered


def prepare_once(model: nn.Module, *, half: bool) -> None:
    """Call `prepare`, unless it has been called."""
    if not is_prepared(model):
        prepare(model, half=half)


def choose_kernel(requested: str, *, device: torch.device, dtype: torch.dtype) -> str:
    """Return the kernel to use for a request such as `auto`.

    Raises ConfigError if the requested kernel does not exist or is not available here.
    """
    problems = {name: _problem(name, device, dtype) for name in KERNELS}
    if requested == "auto":
        return next(n for n in ("varlen", "sdpa") if problems[n] is None)
    if requested not in KERNELS:
        raise ConfigError(
            f"--attn_implementation: expected one of {', '.join(CHOICES)}; found '{requested}'."
        )
    if problems[requested]:
        usable = ", ".join(name for name, problem in problems.items() if problem is None)
        raise ConfigError(
            f"--attn_implementation {requested}: {problems[requested]}. "
            f"Usable here: auto, {usable}."
        )
    return requested


def _problem(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """The reason why a kernel cannot run here, or None."""
    if name == "sdpa":
        return None
    if device.type != "cuda":
        return f"it needs a CUDA device, and this run is on {device.type}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"it needs bfloat16 or float16, and this run computes in {dtype}"
    if torch.cuda.get_device_capability(device) < AMPERE:
        return "it needs a GPU of compute capability 8.0 (Ampere) or later"
    if name == "varlen":
        return None if _torch_has_varlen() else "this torch is too old for it (2.13 has it)"
    package = FLASH_PACKAGES[name]
    return None if importlib.util.find_spec(package) else f"the package {package} is not installed"


def _torch_has_varlen() -> bool:
    """True unless varlen_attn is missing, or so old that it lacks grouped heads and windows."""
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return False
    from torch.nn.attention.varlen import varlen_attn

    return {"window_size", "scale", "enable_gqa"} <= set(inspect.signature(varlen_attn).parameters)


# The probe.

# Nats by which log-probs may differ from the plain model's, and the share of a gradient: float32
# sums in another order. A leak changes the log-probs of a random model by about 1e-2, of a trained
# one by much more. Beyond that, a multiple of the differences that the plain model has with itself.
TOLERANCE, TOLERANCE_HALF, GRADIENT_TOLERANCE, NOISE_FACTOR = 2e-4, 0.1, 1e-3, 30
# A model whose log-probs change by this much with later tokens is not causal.
CAUSAL, CAUSAL_HALF = 1e-2, 0.5
LEAST = 10  # tokens of a probe: a prompt of 3 and an answer of 7
MOST_WITH_GRADIENT = 1024  # tokens: a backward keeps every layer's activations
ROOM = 8  # positions that a probe leaves, for what generation adds
# Parts of the names of settings beyond which a model computes something else, and how many times
# that far is tried (a choice among k is made where there are more); the most tokens that are tried;
# and the tokens before a completion at which the model is compared with itself.
SWITCHES, MOST, COMPARED = {"window": 1, "chunk_size": 1, "topk": 3, "keep_window": 3}, 4096, 64


class _Probe:
    """A prompt with two completions, and what the model says of each alone, unchanged.

    Nothing where the parameters are not materialised: then every comparison is skipped.
    """

    def __init__(self, model: nn.Module) -> None:
        parameter = next(model.parameters())
        self.skipped = parameter.is_meta or hasattr(parameter, "ds_id")
        if self.skipped:
            return
        self.device, is_half = parameter.device, parameter.element_size() < 4
        trains = any(weight.requires_grad for weight in model.parameters())
        self.prompt, self.completions = probe_ids(model)
        self.with_gradient = trains and not is_half and len(self.prompt) < MOST_WITH_GRADIENT
        self.compared = compared = min(COMPARED, len(self.prompt) - 1)
        with in_evaluation(model):
            alone, raised = attempted(lambda: [self._alone(model, c) for c in self.completions])
        if raised:
            raise ConfigError(
                f"{type(model).__name__}: expected log-probs from a forward of text alone; it "
                f"raises {raised}"
            )
        before = torch.stack([logps[:compared] for logps, _ in alone])
        noise = (before[0] - before[1]).abs().max().item()
        if not noise <= (CAUSAL_HALF if is_half else CAUSAL):
            raise ConfigError(
                f"{type(model).__name__} is not causal: its log-probs of a token change by "
                f"{noise:.2g} nats with the tokens after it. Expected a causal language model."
            )
        self.tolerance = max(TOLERANCE_HALF if is_half else TOLERANCE, NOISE_FACTOR * noise)
        self.logps = torch.cat([logps[compared:] for logps, _ in alone])
        length = len(self.prompt)
        parts = [gradient for _, gradient in alone if gradient is not None]
        self.gradient = None
        if len(parts) == len(alone):
            shared = sum(gradient[:length] for gradient in parts)
            self.gradient = torch.cat([shared, *(gradient[length:] for gradient in parts)])

    def _alone(self, model: nn.Module, completion: list[int]) -> tuple[Tensor, Tensor | None]:
        """Log-probs of the last prompt tokens and of the completion; the embeddings' slopes."""
        ids = torch.tensor([self.prompt + completion], device=self.device)
        num_scored = self.compared + len(completion)
        wanted = {"use_cache": False, "logits_to_keep": num_scored + 1}
        accepted = inspect.signature(model.forward).parameters
        inputs = {name: value for name, value in wanted.items() if name in accepted}
        with torch.set_grad_enabled(self.with_gradient), _embeddings(model) as embedded:
            logits = model(input_ids=ids, **inputs).logits[0]
            targets = ids[0, -num_scored:]
            log_probs = logits[-num_scored - 1 : -1].float().log_softmax(-1)
            logps = log_probs.gather(-1, targets[:, None]).squeeze(-1)
            slope = self._slope([logps[self.compared :]], embedded)
        return logps.detach(), None if slope is None else slope[0]

    def _slope(self, parts: Sequence[Tensor], embedded: list[Tensor]) -> Tensor | None:
        """The gradient of a weighted sum of log-probs in the embeddings, if they were caught."""
        if not self.with_gradient or len(embedded) != 1:
            return None
        places = [torch.arange(len(part), device=self.device) for part in parts]
        weights = torch.cat([place.cos() for place in places])
        (torch.cat(list(parts)) * weights).sum().backward(inputs=embedded)
        return embedded[0].grad

    def compare(self, model: nn.Module) -> str | None:
        """Return how a prepared model differs from what it was; None if it does not."""
        if self.skipped:
            return None
        segments = [Segment(self.prompt)]
        for row, ids in enumerate(self.completions):
            segments.append(Segment(ids, 0, scored=[True] * len(ids), row=row))
        batch = pack(segments, num_rows=len(self.completions), device=self.device)
        found, raised = attempted(lambda: self._together(model, batch))
        if raised:
            return f"its forward does not take such a batch ({raised})"
        logps, slope = found
        gap = (logps.detach() - self.logps).abs().max().item()
        if not gap <= self.tolerance:
            return (
                "log-probs of a packed batch differ from those of its sequences run alone by "
                f"{gap:.2g} nats"
            )
        if slope is None:
            return None
        gap = ((slope[0] - self.gradient).norm() / self.gradient.norm().clamp(min=1e-30)).item()
        if not gap <= GRADIENT_TOLERANCE:
            return f"gradients of a packed batch differ from those run alone by {gap:.2g} of them"
        return None

    def _together(self, model: nn.Module, batch: PackedBatch) -> tuple[Tensor, Tensor | None]:
        """Log-probs of both completions in one packed batch, and the embeddings' slopes."""
        with (
            in_evaluation(model),
            torch.set_grad_enabled(self.with_gradient),
            _embeddings(model) as embedded,
        ):
            logps, slope = packed_logps(model, batch).logps, None
            if self.gradient is not None and not computes_rows(model):
                parts = logps.split([len(ids) for ids in self.completions])
                slope = self._slope(parts, embedded)
        return logps, slope


def probe_ids(model: nn.Module) -> tuple[list[int], list[list[int]]]:
    """Return a prompt and two completions that reach beyond every switch in the model's config."""
    config = model.config.get_text_config()
    limit, length = getattr(config, "max_position_embeddings", None) or MOST, 16
    if 0 < limit < LEAST:
        raise ConfigError(
            f"{type(model).__name__}: expected at least {LEAST} positions "
            f"(max_position_embeddings), found {limit}."
        )
    for name, value in vars(config).items():
        times = max((n for part, n in SWITCHES.items() if part in name), default=0)
        if times and isinstance(value, int):
            length = max(length, times * value + 8)
    if limit > 0:  # -1 where a family has no limit
        length = max(LEAST, min(length, limit - ROOM))
    length = min(length, MOST)
    rows = [model.get_input_embeddings(), model.get_output_embeddings()]
    vocabulary = min(layer.weight.shape[0] for layer in rows)
    ids = torch.arange(1, length + 4).mul(7919).remainder(vocabulary).tolist()
    start = length - 7
    return ids[:start], [ids[start : start + 3], ids[start + 3 : start + 10]]


@contextmanager
def _embeddings(model: nn.Module) -> Iterator[list[Tensor]]:
    """Yield a list to which the outputs of the embedding are added, each a leaf with gradient."""
    caught = []

    def catch(_module: nn.Module, _inputs: tuple, output: Tensor) -> Tensor | None:
        if not torch.is_grad_enabled():
            return None
        caught.append(output.detach().requires_grad_())
        return caught[-1].clone()  # some models write into it

    hook = model.get_input_embeddings().register_forward_hook(catch)
    try:
        yield caught
    finally:
        hook.remove()
