"""One forward of a packed batch: what a model is called with, and the scores that come back.

    scores = packed_logps(model, batch, temperature=1.0, with_entropy=True)
    logps = batch.dense(scores.logps)                # (B, T)

The layout goes to attention as the keyword argument `packed`, the targets go to the LM head beside
the model's arguments (posttrain.packed.head), so any wrapper around the model passes both on.
Without `packed` the same attention is plain, so that `generate` and ordinary forwards stay right.
posttrain.packed.prepare makes a model ready for it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from posttrain.errors import ConfigError
from posttrain.packed.batch import Layout, PackedBatch
from posttrain.packed.cuda_kernels import KERNELS
from posttrain.packed.half import hold_in_half
from posttrain.packed.head import Change, ScoringHead, TokenScores, requesting_scores
from posttrain.packed.kernels import Kernel, Rules, dense_attention, sees
from posttrain.run.options import say

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, TrainingArguments

    from posttrain.packed.ahead import Ahead

MOST_TOKENS, MOST_TOKENS_CPU = 16384, 2048  # packed tokens of a forward
# Names that transformers knows the kernels by. Not "sdpa": it refuses names with that in them for
# models whose scores are capped or have sinks.
REGISTERED = {name: f"posttrain_{name}" for name in KERNELS} | {"sdpa": "posttrain_buckets"}


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


def computes_rows(model: nn.Module) -> bool:
    """True for a (PEFT-wrapped or bare) model that is computed by rows."""
    return getattr(model, "rows_padded", None) is not None


def switch_off_dropout(model: nn.Module) -> None:
    """Set every dropout of the model to 0: policy, reference and sampler must be one function.

    An adapter that is added later keeps its own.
    """
    dropped = []
    for module in model.modules():
        dropouts = [name for name in vars(module) if "drop" in name]
        for name in ["p"] if isinstance(module, nn.Dropout) else dropouts:
            if isinstance(vars(module)[name], float) and vars(module)[name] > 0:
                setattr(module, name, 0.0)
                dropped.append(module)
    for config in (model.config, model.config.get_text_config()):  # some forwards read it there
        for name, value in vars(config).items():
            if "drop" in name and isinstance(value, float) and value > 0:
                setattr(config, name, 0.0)
    if dropped:
        say(f"dropout of the model's config is off, in {len(dropped)} layers")


def heads_of(model: nn.Module) -> dict[str, int]:
    """Return num_heads, num_kv_heads and head_dim of the model's attention."""
    config = model.config.get_text_config()
    config = (getattr(config, "per_layer_config", None) and config.per_layer_config[0]) or config
    num_heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // num_heads
    if unrotated := getattr(config, "qk_nope_head_dim", None):  # MLA, whose head_dim is another's
        head_dim = unrotated + config.qk_rope_head_dim
    return {
        "num_heads": num_heads,
        "num_kv_heads": getattr(config, "num_key_value_heads", None) or num_heads,
        "head_dim": head_dim,
    }


# Trying a forward.

# What a forward may raise that gets arguments which it was not written for.
FORWARD_ERRORS = (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


def attempted(call: Callable[[], Any]) -> tuple[Any, str | None]:
    """Return what a forward gives, or the first line of what it raises (but for lack of memory)."""
    try:
        return call(), None
    except torch.OutOfMemoryError:
        raise
    except FORWARD_ERRORS as error:
        return None, f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]:.120}"


@contextmanager
def in_evaluation(model: nn.Module) -> Iterator[None]:
    """Put the model into evaluation mode inside, and back afterwards."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


# Attention.


class Step(NamedTuple):
    """Stands in for the layout where a decode loop computes one token a row over a cache.

    first: (R,) slot of each row's first token; the slots before it are padding.
    """

    first: Tensor


# The modules that call packed attention, where someone wants to know.
CALLERS: ContextVar[list[nn.Module] | None] = ContextVar("callers", default=None)


def _attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    kernel: Kernel,
    scaling: float | None = None,
    packed: Layout | Step | Ahead | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    dropout: float = 0.0,
    **_: object,  # what the interface passes to every implementation and packed attention ignores
) -> tuple[Tensor, None]:
    """The function that Hugging Face's attention interface calls: (b, h, n, d) -> (b, n, h, d)."""
    if dropout:
        raise ConfigError(
            f"the model applies attention dropout ({dropout:g}), which packed attention does not "
            "have. Set it to 0 in the model's config.json."
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    rules = Rules(sliding_window, _chunk_of(module), softcap, s_aux)
    if not isinstance(packed, Layout):
        if isinstance(packed, Step):
            key, value, attention_mask = _within_reach(key, value, attention_mask, rules, packed)
        elif packed is not None:
            return packed.attend(query, key, value, scale=scale, rules=rules), None
        out = dense_attention(query, key, value, attention_mask, scale=scale, rules=rules)
        return out.transpose(1, 2), None
    if packed.images:
        raise ConfigError(
            "the data has images, and the model was loaded as a model of text. Load it with "
            "load_model(config, images=True)."
        )
    if (callers := CALLERS.get()) is not None:
        callers.append(module)
    query, key, value = (states[0].transpose(0, 1) for states in (query, key, value))
    # Under autocast rotary embedding leaves queries and keys in float32, values in half precision.
    query, key = query.to(value.dtype), key.to(value.dtype)
    return kernel(query, key, value, layout=packed, scale=scale, rules=rules)[None], None


def _chunk_of(module: nn.Module) -> int | None:
    """The size of the chunks that a layer's attention stays in (Llama 4), or None."""
    config = getattr(module, "config", None)
    size = getattr(config, "attention_chunk_size", None)
    kinds = getattr(config, "layer_types", None)
    if not size or not kinds or kinds[module.layer_idx] != "chunked_attention":
        return None
    return size


def _within_reach(
    key: Tensor, value: Tensor, mask: Tensor, rules: Rules, step: Step
) -> tuple[Tensor, Tensor, Tensor]:
    """The keys, values and mask of a decode step, without what lies outside window and chunk."""
    length = key.shape[2]
    if rules.chunk is not None and rules.chunk < length:
        slots = torch.arange(length, device=key.device) - step.first[:, None]  # (R, slots)
        mask = mask & sees(slots[:, -1:], slots, None, rules.chunk)[:, None, None]
    if rules.window is not None and rules.window < length:
        last = slice(length - rules.window, None)
        key, value, mask = key[:, :, last], value[:, :, last], mask[..., last]
    return key, value, mask


def register() -> None:
    """Make the names of REGISTERED known to transformers. Idempotent."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    for kernel, name in REGISTERED.items():
        attend = partial(_attention_forward, kernel=KERNELS[kernel])
        AttentionInterface.register(name, attend)
        AttentionMaskInterface.register(name, sdpa_mask)  # for forwards without `packed`


# What models do to the logits of their head, by the names of settings, and the value of no change.
CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
SCALES = {"logit_scale": 1, "lm_head_multiplier": 1, "logits_scaling": -1}  # the power of each
NO_CHANGE = dict.fromkeys(CAPS) | dict.fromkeys(SCALES, 1.0)


def _change_of(model: nn.Module) -> Change:
    """Read from the settings what the model does to its logits, and see whether it does."""
    config = model.config.get_text_config()
    places = {id(p): p for p in (model, model.base_model, model.config, config)}.values()
    found = tuple(
        (place, name, neutral)
        for place in places
        for name, neutral in NO_CHANGE.items()
        if isinstance(vars(place).get(name), (int, float)) and vars(place)[name] != neutral
    )
    if not found:
        return Change()
    settings = {name: getattr(place, name) for place, name, _ in found}
    scale = math.prod(settings[name] ** n for name, n in SCALES.items() if name in settings)
    change = Change(float(scale), next((settings[n] for n in CAPS if n in settings), None), found)
    if next(model.parameters()).is_meta:
        return change
    head = model.get_output_embeddings()
    given = torch.linspace(-9, 9, head.out_features, device=head.weight.device)[None, None]
    hook = head.register_forward_hook(lambda *_: given.clone())
    try:
        with torch.no_grad():
            ids = torch.zeros(1, 8, dtype=torch.long, device=given.device)
            seen = model(ids, use_cache=False).logits.float()
    finally:
        hook.remove()
    if torch.allclose(seen, given, rtol=1e-3, atol=1e-3):  # applied before the head
        return Change()
    if not torch.allclose(seen, change.applied(given), rtol=1e-2, atol=1e-2):
        names = ", ".join(settings)
        raise ConfigError(f"{type(model).__name__} changes its logits ({names}) in an unknown way.")
    return change


def install_scoring_head(model: nn.Module) -> None:
    """Replace `model`'s LM head by a ScoringHead over the same parameters. Idempotent.

    Raises ConfigError for a head that is not a plain linear layer, or whose logits the model
    changes afterwards in a way that is not known.
    """
    head = model.get_output_embeddings()
    if isinstance(head, ScoringHead):
        return
    name = type(model).__name__
    if type(head) is not nn.Linear:
        raise ConfigError(
            f"{name}: expected a linear LM head, found {type(head).__name__}. "
            "A causal language model with a plain head is needed."
        )
    change = _change_of(model)
    model.set_output_embeddings(ScoringHead.replacing(head))
    model.get_output_embeddings().change = change


def frozen_copy(
    model: nn.Module, device: torch.device, *, half: torch.dtype | None = None
) -> nn.Module | None:
    """Copy a model that is about to train, to be its reference.

    Returns None for a model with an adapter, which is switched off instead. half: the format that
    autocast will run forwards in; the copy's linear layers are then held in it, at half the memory
    and with the same results.
    """
    if hasattr(model, "disable_adapter"):
        return None
    copied = copy.deepcopy(model).requires_grad_(False).eval()
    if half:
        hold_in_half(copied, half)
    return copied.to(device)


def check_context(model: nn.Module, num_tokens: int, remedy: str) -> None:
    """Refuse sequences beyond the model's positions with a ConfigError.

    num_tokens: of the longest sequence. remedy: a sentence that says which setting to lower.
    """
    config = model.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") in ("longrope", "dynamic"):
        short = rope.get("original_max_position_embeddings") or config.max_position_embeddings
        if num_tokens > short:
            raise ConfigError(
                f"the longest sequence has {num_tokens:,} tokens, and beyond {short:,} the "
                f"{rope['rope_type']} positions of {type(model).__name__} depend on the longest "
                f"sequence of a batch, which packing does not serve. {remedy}"
            )
    limit = getattr(config, "max_position_embeddings", None)
    if limit and num_tokens > limit:
        raise ConfigError(
            f"the longest sequence has {num_tokens:,} tokens, and {type(model).__name__} has "
            f"{limit:,} positions (max_position_embeddings). {remedy}"
        )


def tokens_at_once(device: torch.device) -> int:
    """Return how many packed tokens a forward on this device takes where nobody says.

    On a CPU the activations are then found in its caches, and a step's cost grows with its tokens
    alone: measured with 1M parameters in float32, a token of 65,536 costs as much as one of 8,192,
    and 0.55 of what it does where all are one micro-batch, in a tenth of the memory.
    """
    return MOST_TOKENS_CPU if device.type == "cpu" else MOST_TOKENS


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
    half_only = {name for kernel, name in REGISTERED.items() if kernel != "sdpa"}
    if kernel in half_only and not is_half:
        raise ConfigError(
            f"the model was prepared with {kernel}, which computes in half precision, and the "
            "training arguments say float32. Set bf16=True, or load the model with "
            "--dtype float32."
        )


@torch.no_grad()
def is_finite(values: Tensor) -> bool:
    """True if no number is NaN or infinite; without a copy of the size of `values`."""
    return values.numel() == 0 or all(bool(x.isfinite()) for x in torch.aminmax(values.detach()))
