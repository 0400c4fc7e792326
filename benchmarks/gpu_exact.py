"""The parts of benchmarks.gpu_check that judge: what is computed, and how often the host waits.

`kernels` compares every attention kernel that is here with attention by its definition in float64,
on the same rounded inputs. `packed` compares log-probs and gradients of packed bfloat16 forwards
with float32 forwards of each sequence alone, and takes as its measure how far bfloat16 forwards of
each sequence alone are from those. `waits` counts how often a step waits for the device.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, TrainerCallback

from benchmarks.child import Job
from benchmarks.gpu_lines import Line, rows, scale_of, with_examples
from benchmarks.workload import SIZES, made_documents, made_pairs, model_folder
from posttrain.errors import ConfigError
from posttrain.packed.batch import Layout, PackedBatch, Segment, pack, pack_groups
from posttrain.packed.cuda_kernels import KERNELS
from posttrain.packed.forward import FORWARD_ERRORS, packed_logps
from posttrain.packed.kernels import Rules
from posttrain.packed.prepare import choose_kernel, prepare
from posttrain.run.engine import this_device

# Sizes of the heads of queries and keys, and of values; the last are those of DeepSeek's MLA.
HEADS = ((64, 64), (80, 80), (96, 96), (128, 128), (192, 128))
QUERY_HEADS, GROUPS, WINDOW = 8, (1, 4), 100
# Largest relative 2-norm of an error. bfloat16 rounds probabilities and results to 8 bits: SDPA on
# a CPU errs by 0.007, in the gradients of shared prompts; a window that is off by one by 0.08.
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 0.02}
# Errors of packed bfloat16 forwards over those of plain ones: 1 if packing adds nothing.
PACKED_LIMIT = 1.5
MOST_WAITS = 2  # of an optimizer step, for the norm of its gradient and the optimizer
WAIT = "called a synchronizing CUDA operation"
PROMPTS, COMPLETIONS = (30, 300, 700), ((50,), (10, 90, 330), (120, 20, 20, 270, 80))


# Kernels.


def kernels(job: Job) -> list[dict]:
    """Measure the worst error of each kernel in each head size."""
    device, lines = this_device(), []
    shrink = scale_of(job).shrink
    layouts, windows = _layouts(shrink, device), (None, WINDOW // shrink)
    for name, dtype in [("sdpa", torch.float32), *((name, torch.bfloat16) for name in KERNELS)]:
        what = f"{name}, {str(dtype).removeprefix('torch.')}"
        try:
            choose_kernel(name, device=device, dtype=dtype)
        except ConfigError as error:
            lines.append(Line(what, None, note=str(error)))
            continue
        for heads in HEADS:
            lines.append(_kernel_line(what, KERNELS[name], dtype, heads, layouts, windows))
    return rows(*lines)


def _layouts(shrink: int, device: torch.device) -> dict[str, Layout]:
    """Prompts shared by several completions, and the same sequences as documents."""
    prompts = [[5] * (n // shrink) for n in PROMPTS]
    completions = [[[7] * (n // shrink) for n in siblings] for siblings in COMPLETIONS]
    pairs = zip(prompts, completions, strict=True)
    documents = [Segment([*p, *c]) for p, siblings in pairs for c in siblings]
    return {
        "shared prompts": pack_groups(prompts, completions, device=device).layout,
        "documents": pack(documents, num_rows=0, device=device).layout,
    }


def _kernel_line(
    what: str,
    kernel: Callable,
    dtype: torch.dtype,
    heads: tuple[int, int],
    layouts: dict[str, Layout],
    windows: Sequence[int | None],
) -> Line:
    width, value_width = heads
    size = f"{width}" if width == value_width else f"{width}/{value_width}"
    what, worst, place = f"{what}, heads of {size}", 0.0, ""
    goal = {"goal": LIMITS[dtype], "at_most": True}
    for (kind, layout), group, window in product(layouts.items(), GROUPS, windows):
        try:
            errors = kernel_errors(kernel, layout, dtype, heads, group, window)
        except FORWARD_ERRORS as error:  # the kernel does not take such heads
            note = str(error).strip().partition("\n")[0]
            refuses = width != value_width  # few models have it, and none is computed wrong
            return Line(what, None if refuses else float("inf"), note=f"refused: {note}", **goal)
        for name, found in errors.items():
            if not found <= worst:
                worst = found
                place = f"{name}, {kind}, {group} to a key head, window {window or 'none'}"
    return Line(what, worst, note=place, **goal)


def kernel_errors(
    kernel: Callable,
    layout: Layout,
    dtype: torch.dtype,
    heads: tuple[int, int],
    group: int,
    window: int | None,
) -> dict[str, float]:
    """Relative 2-norms of a kernel's errors in outputs and gradients, against float64."""
    count, draw = sum(layout.lengths), torch.Generator().manual_seed(0)
    num_heads = (QUERY_HEADS, QUERY_HEADS // group, QUERY_HEADS // group, QUERY_HEADS)
    widths = (heads[0], *heads, heads[1])
    *inputs, slopes = (
        torch.randn(count, h, w, generator=draw).to(layout.device, dtype)
        for h, w in zip(num_heads, widths, strict=True)
    )
    scale = heads[0] ** -0.5
    ours = partial(kernel, layout=layout, scale=scale, rules=Rules(window=window))
    exact = partial(exact_attention, layout=layout, scale=scale, window=window)
    found = _with_gradients(ours, inputs, slopes)
    wanted = _with_gradients(exact, [x.double() for x in inputs], slopes.double())
    return {
        name: relative(one, other)
        for name, one, other in zip(("outputs", "dq", "dk", "dv"), found, wanted, strict=True)
    }


def exact_attention(
    query: Tensor, key: Tensor, value: Tensor, *, layout: Layout, scale: float, window: int | None
) -> Tensor:
    """Attention by its definition, one segment at a time; shapes as posttrain.packed.kernels'."""
    group, outputs = query.shape[1] // key.shape[1], []
    key, value = (x.repeat_interleave(group, 1) for x in (key, value))
    for i, (start, length) in enumerate(zip(layout.starts, layout.lengths, strict=True)):
        seen = torch.cat([torch.arange(*r, device=key.device) for r in layout.key_ranges(i)])
        order = torch.arange(len(seen), device=key.device)
        ages = order[-length:, None] - order  # (queries, keys); negative: in the future
        hidden = (ages < 0) | (ages >= (window or len(seen)))
        scores = torch.einsum("qhd,khd->hqk", query[start : start + length], key[seen]) * scale
        shares = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        outputs.append(torch.einsum("hqk,khd->qhd", shares, value[seen]))
    return torch.cat(outputs)


def _with_gradients(attend: Callable, inputs: Sequence[Tensor], slopes: Tensor) -> list[Tensor]:
    inputs = [x.detach().requires_grad_() for x in inputs]
    outputs = attend(*inputs)
    return [outputs.detach(), *torch.autograd.grad(outputs, inputs, slopes)]


def relative(found: Tensor, wanted: Tensor) -> float:
    """Return the 2-norm of the difference, as a share of the wanted one's."""
    return ((found.double() - wanted.double()).norm() / wanted.double().norm()).item()


# Packed forwards.


def packed(job: Job) -> list[dict]:
    """Measure what packing adds to the rounding errors of a LLaMA's and a Qwen3's forward."""
    shrink = scale_of(job).shrink
    return rows(*(line for family in ("llama", "qwen3") for line in _packed_lines(family, shrink)))


def _packed_lines(family: str, shrink: int) -> list[Line]:
    device, groups = this_device(), _groups(shrink)
    plain, ours = (_model(family, shrink).to(device) for _ in range(2))
    kernel = prepare(ours, device=device, half=True)
    batch = pack_groups(*groups, device=device)
    exact = _logps_and_gradients(plain, partial(_row_by_row, groups=groups), half=False)
    rounded = _logps_and_gradients(plain, partial(_row_by_row, groups=groups), half=True)
    found = _logps_and_gradients(ours, partial(_packed, batch=batch), half=True)
    lines = []
    for i, name in enumerate(("log-probs", "gradients")):
        one, other = relative(found[i], exact[i]), relative(rounded[i], exact[i])
        lines.append(
            Line(
                f"{family}, {kernel}: error of packed {name} over that of plain bfloat16",
                one / other,
                "x",
                PACKED_LIMIT,
                at_most=True,
                note=f"{one:.1e} and {other:.1e}",
            )
        )
    return lines


def _model(family: str, shrink: int) -> nn.Module:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        family,
        vocab_size=1_000,
        hidden_size=640 // shrink,
        intermediate_size=1_280 // shrink,
        num_hidden_layers=4 if shrink == 1 else 2,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=80 if shrink == 1 else 8,
        initializer_range=0.05 * shrink**0.5,  # log-probs that differ, and show a leak
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def _groups(shrink: int) -> tuple[list[list[int]], list[list[list[int]]]]:
    """Prompts and completions of random tokens."""
    draw = torch.Generator().manual_seed(0)

    def ids(count: int) -> list[int]:
        return torch.randint(2, 1_000, (count // shrink,), generator=draw).tolist()

    prompts = [ids(n) for n in PROMPTS]
    return prompts, [[ids(n) for n in siblings] for siblings in COMPLETIONS]


def _packed(model: nn.Module, *, batch: PackedBatch) -> Tensor:
    return packed_logps(model, batch).logps


def _row_by_row(model: nn.Module, *, groups: tuple[list, list]) -> Tensor:
    """Log-probs of all completions' tokens, by a plain forward of each sequence."""
    pairs = zip(*groups, strict=True)
    found = []
    for prompt, completion in ((p, c) for p, siblings in pairs for c in siblings):
        ids = torch.tensor([*prompt, *completion], device=model.device)
        logits = model(input_ids=ids[None], use_cache=False).logits[0, len(prompt) - 1 : -1]
        logps = logits.float().log_softmax(-1)
        found.append(logps.gather(1, ids[len(prompt) :, None])[:, 0])
    return torch.cat(found)


def _logps_and_gradients(
    model: nn.Module, logps_of: Callable[[nn.Module], Tensor], *, half: bool
) -> tuple[Tensor, Tensor]:
    """(S,) log-probs, and all gradients of their sum under weights of both signs."""
    model.zero_grad()
    with torch.autocast(this_device().type, torch.bfloat16, enabled=half):
        logps = logps_of(model)
        weights = torch.arange(len(logps), device=logps.device).cos()
        (logps * weights).sum().backward()
    gradients = [w.grad.flatten() for w in model.parameters() if w.grad is not None]
    return logps.detach(), torch.cat(gradients)


# Waits.


def waits(job: Job) -> list[dict]:
    """Count how often the second optimizer step of each trainer waits for the device."""
    from benchmarks import dpo, groups, grpo, sft
    from benchmarks.measure import Clock

    if this_device().type != "cuda":
        return rows(Line("waits of a step", None, note="a CPU has no device to wait for"))
    size = SIZES["tiny"]
    job = replace(job, setting={}, model=str(model_folder(size, None)), steps=1)
    makers = {
        "SFT": (made_documents, 6, sft.our_trainer),
        "DPO": (made_pairs, 4, partial(dpo.our_trainer, clock=Clock())),
    }
    lines = []
    for name, (make, count, trainer) in makers.items():
        examples = make(2 * count, vocabulary=size.vocabulary)
        found = step_waits(with_examples(job, examples, count), trainer)
        lines.append(wait_line(name, found))
    examples = groups.make_groups(2, groups.GroupConfig(), size, Path())
    recorded = with_examples(job, examples, 1)
    with grpo.recorded_completions(recorded):
        lines.append(wait_line("GRPO", step_waits(recorded, groups.our_trainer)))
    return rows(*lines)


def step_waits(job: Job, make_trainer: Callable[..., Any]) -> list[str]:
    """Return the lines of code at which the second optimizer step waited for the device."""
    watch = StepWaits()
    small = {"max_tokens_per_microbatch": 512}  # several micro-batches
    make_trainer(job, [watch], **small).train()
    return watch.places


def wait_line(name: str, places: list[str]) -> Line:
    """Return the line of a trainer that waited at these places."""
    note = ", ".join(sorted(set(places)))
    return Line(f"{name}, waits of a step", len(places), "", MOST_WAITS, at_most=True, note=note)


class StepWaits(TrainerCallback):
    """Lists where the second optimizer step waits, from its first batch to the optimizer's end."""

    def __init__(self) -> None:
        self.places: list[str] = []
        self._watch = ExitStack()

    def on_step_begin(self, args, state, control, **_):  # noqa: ARG002
        if state.global_step == 1:
            self._watch.enter_context(recorded_waits(self.places))

    def on_step_end(self, args, state, control, **_):  # noqa: ARG002
        self._watch.close()


@contextmanager
def recorded_waits(places: list[str]) -> Iterator[None]:
    """Add to `places` a `file:line` for each wait for the GPU inside, as CUDA warns of it."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")
            found = [w for w in caught if WAIT in str(w.message)]
            places += [f"{'/'.join(Path(w.filename).parts[-2:])}:{w.lineno}" for w in found]
