"""Loading a tokenizer and a model: to be trained, or to be used as it is.

    tokenizer = load_tokenizer(config.model_name_or_path)
    model = load_model(config)                 # config: posttrain.run.settings.ModelConfig
    model = load_for_inference(config)         # in the number format that it was saved in

Trained weights are float32, the optimizer's master copy. Weights that stay as they are, such as
the model below a LoRA adapter, are held in bfloat16 where forwards compute in it.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from posttrain.errors import ConfigError, PosttrainError
from posttrain.models.gguf import SUFFIX, forget_quantisation, gguf_of
from posttrain.models.lora import base_of, lora_summary, refuse_layers, with_lora
from posttrain.packed.batch import pack_documents
from posttrain.packed.forward import is_finite, packed_logps
from posttrain.packed.half import hold_in_half
from posttrain.packed.prepare import choose_kernel, prepare
from posttrain.run.engine import half_dtype, is_sharded, this_device
from posttrain.run.options import say

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from posttrain.run.settings import ModelConfig

LFS_POINTER = b"version https://git-lfs"


def load_tokenizer(model_name_or_path: str) -> PreTrainedTokenizerBase:
    """Load a model's tokenizer.

    Raises ConfigError when it is not there, or has no end-of-sequence token: completions need one.
    """
    from transformers import AutoTokenizer

    check_folder(model_name_or_path)
    place, settings = place_of(model_name_or_path)
    with _in_plain_words(model_name_or_path):
        tokenizer = AutoTokenizer.from_pretrained(place, **settings)
    of_processor = Path(place) / "chat_template.json"  # where models of images may have it
    if not tokenizer.chat_template and of_processor.is_file():
        tokenizer.chat_template = json.loads(of_processor.read_bytes())["chat_template"]
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            f"the tokenizer of {model_name_or_path} has no end-of-sequence token, so no answer "
            "could ever end. Set `eos_token` in its tokenizer_config.json."
        )
    return tokenizer


def load_model(config: ModelConfig, *, quiet: bool = False, images: bool = False) -> nn.Module:
    """Load the causal LM `config.model_name_or_path` to be trained: see make_trainable.

    Weights are loaded in float32. A folder that holds a LoRA adapter is loaded on its base and
    merged. images: the data has some, so the whole vision-language model is loaded.

    Raises ConfigError for a model that is not there or that packing cannot serve.
    """
    if images:
        from posttrain.models.vision import by_rows, load_class

        config = by_rows(config)
    auto_class = load_class() if images else None
    check_asked(config, auto_class)
    model = _read_weights(config.model_name_or_path, torch.float32, config, auto_class)
    if not images:
        return make_trainable(model, config, quiet=quiet)
    from posttrain.models.vision import check_vision, with_vision

    model = with_vision(model, config.model_name_or_path)
    return make_trainable(model, config, quiet=quiet, check=check_vision)


def load_for_inference(config: ModelConfig) -> nn.Module:
    """Load the causal LM `config.model_name_or_path` to be used as it is, with packed attention.

    Its weights keep the number format that they were saved in where this device computes in it,
    and are float32 elsewhere; forwards need no autocast. Nothing has a gradient.
    """
    check_asked(config)
    model = _read_weights(config.model_name_or_path, "auto")
    device, dtype = this_device(), next(model.parameters()).dtype
    if dtype != half_dtype(config.dtype):
        model.float()
    model.to(device)
    prepare(model, attn_implementation=config.attn_implementation)
    if device.type == "cpu":
        choose_threads(model)
    return model.requires_grad_(False).eval()


def check_asked(config: ModelConfig, auto_class: type | None = None) -> None:
    """Raise ConfigError for a kernel or LoRA layers that cannot be had, before weights are read."""
    if config.attn_implementation != "rows":
        dtype = half_dtype(config.dtype) or torch.float32
        choose_kernel(config.attn_implementation, device=this_device(), dtype=dtype)
    if config.lora_target_modules or config.lora_modules_to_save:
        refuse_layers(_without_weights(config.model_name_or_path, auto_class), config)


def _without_weights(name: str, auto_class: type | None) -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    check_folder(name)
    name = base_of(name)
    place, settings = place_of(name)
    with _in_plain_words(name), torch.device("meta"):
        auto_class = auto_class or AutoModelForCausalLM
        return auto_class.from_config(AutoConfig.from_pretrained(place, **settings))


def _read_weights(
    name: str,
    dtype: torch.dtype | str,
    config: ModelConfig | None = None,
    auto_class: type | None = None,
) -> nn.Module:
    """A causal LM with the weights of a folder or a Hub name; `auto`: in their own dtype.

    config: says in which format they are held, where they will not be trained.
    """
    from transformers import AutoModelForCausalLM
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    # After an earlier ZeRO-3 run in this process transformers would load empty, sharded weights.
    unset_hf_deepspeed_config()
    is_adapter = (Path(name) / "adapter_config.json").is_file()
    if config is not None and config.quantization != "none":
        if is_adapter:
            raise ConfigError(
                f"--quantization: expected a whole model, found the adapter {name}. Merge it into "
                "its base first: posttrain merge"
            )
        return _read_quantised(name, config, auto_class or AutoModelForCausalLM)
    auto_class = auto_class or AutoModelForCausalLM
    if not is_adapter:
        return load_whole(auto_class, name, dtype=dtype)
    # Always in float32: bfloat16 would round away what the adapter has learnt.
    return load_merged(auto_class, name, dtype=torch.float32)


def _read_quantised(name: str, config: ModelConfig, auto_class: type) -> nn.Module:
    from posttrain.models.quantised import hold_as_loaded, quantised_settings

    settings = quantised_settings(config)
    model = load_whole(auto_class, name, dtype=torch.float32, **settings)
    hold_as_loaded(model)
    return model


def load_whole(
    auto_class: type, name: str, *, replaced: Collection[str] = (), **settings: object
) -> nn.Module:
    """Load a model of a transformers Auto class, with the weights that are saved and no others.

    replaced: names of layers whose weights will come from elsewhere, as an adapter's head does.

    Raises ConfigError for weights that are missing, left over, of another shape, damaged or not
    finite: transformers would make up the first and drop the second with a warning.
    """
    check_folder(name)
    place, of_file = place_of(name)
    with _in_plain_words(name):
        model, found = auto_class.from_pretrained(
            place, output_loading_info=True, **settings, **of_file
        )
    if of_file:
        forget_quantisation(model)
    if replaced:
        heads = (*replaced, "lm_head")
        found = {k: [x for x in v or () if not str(x).startswith(heads)] for k, v in found.items()}
    if found.get("unexpected_keys"):
        from posttrain.heads.names import is_module_name

        left = [key for key in found["unexpected_keys"] if not is_module_name(key, model.config)]
        found = {**found, "unexpected_keys": left}
    _refuse_other_keys(name, type(model).__name__, found)
    for key, weight in model.named_parameters():
        if not is_finite(weight):
            raise ConfigError(
                f"--model_name_or_path: {name} holds numbers that are not finite, in {key} first. "
                "Take an earlier checkpoint of it, or download it again."
            )
    return model


def load_merged(auto_class: type, name: str, **settings: object) -> nn.Module:
    """Load a LoRA adapter on its base, and merge it; ConfigError as for `load_whole`."""
    from peft import PeftConfig, PeftModel, get_peft_model_state_dict, load_peft_weights

    with _in_plain_words(name):
        adapter = PeftConfig.from_pretrained(name)
    replaced = tuple(adapter.modules_to_save or ())
    settings["revision"] = adapter.revision  # of the base
    model = load_whole(auto_class, adapter.base_model_name_or_path, replaced=replaced, **settings)
    _refuse_tied_target(name, adapter.target_modules, model)
    with _in_plain_words(name):
        tokens = len(load_tokenizer(name)) if (Path(name) / "tokenizer.json").is_file() else 0
        if tokens > model.get_input_embeddings().num_embeddings:
            model.resize_token_embeddings(tokens)
        model = PeftModel.from_pretrained(model, name)
        saved, needed = (
            set(load_peft_weights(name, device="cpu")),
            set(get_peft_model_state_dict(model)),
        )
    saved = {key for key in saved if key in needed or "lora_" in key}  # embeddings may come along
    found = {"missing_keys": needed - saved, "unexpected_keys": saved - needed}
    _refuse_other_keys(name, "its adapter_config.json", found)
    return model.merge_and_unload().requires_grad_(True)  # PEFT has frozen the base


def _refuse_tied_target(name: str, targets: Collection[str], model: nn.Module) -> None:
    """Refuse an adapter on one of two layers that share a weight: merged, it would change both."""
    tied = {"lm_head", "embed_tokens"}.intersection(targets or ())
    if tied and getattr(model.config, "tie_word_embeddings", False):
        raise ConfigError(
            f"--model_name_or_path: the adapter {name} changes {', '.join(sorted(tied))}, whose "
            "weight the head and the embedding share, so that it cannot be merged into the model. "
            "Train the adapter without it, or untie the base (tie_word_embeddings: false)."
        )


def _refuse_other_keys(name: str, owner: str, found: Mapping[str, Collection]) -> None:
    kinds = {
        "missing_keys": "is missing, which {owner} needs: it would be random",
        "mismatched_keys": "has another shape than config.json says",
        "unexpected_keys": "has no place in {owner}: it would be dropped",
    }
    for kind, what in kinds.items():
        keys = sorted(key if isinstance(key, str) else key[0] for key in found.get(kind) or ())
        if keys:
            more = f" (and {len(keys) - 1} more)" if len(keys) > 1 else ""
            raise ConfigError(
                f"--model_name_or_path: in {name}, {keys[0]}{more} {what.format(owner=owner)}. "
                "Is config.json that of these weights, and was the copy complete?"
            )


def make_trainable(
    model: nn.Module,
    config: ModelConfig,
    *,
    quiet: bool = False,
    check: Callable[[nn.Module], None] | None = None,
) -> nn.Module:
    """Move `model` to this process's device, prepare it for packed batches, add LoRA if asked.

    check: looks at the prepared model, and raises ConfigError for one that cannot be trained.
    Under LoRA the frozen linear layers are then held in the dtype that forwards compute in.
    """
    device, half = this_device(), half_dtype(config.dtype)
    quantised = config.quantization != "none"
    # DeepSpeed and FSDP place the parts themselves: no GPU need hold it all.
    if not is_sharded() and not quantised:
        model.to(device)
    kernel = prepare(
        model,
        attn_implementation=config.attn_implementation,
        device=device,
        half=half is not None,
        router_aux_loss_coef=config.router_aux_loss_coef,
    )
    if check is not None:
        check(model)
    num_parameters = model.num_parameters()  # of 4 bits, two lie in a byte
    if config.use_peft:
        model = with_lora(model, config)
    threads = choose_threads(model) if device.type == "cpu" else 0
    if half and not is_sharded():  # engines that divide a model cast it in their own way
        hold_in_half(model, half)
    if half and quantised:
        from posttrain.models.quantised import compute_in

        compute_in(model, half)
    if not quiet:
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        lora = f", {trained / 1e6:,.2f}M of them trained (LoRA)" if config.use_peft else ""
        say(
            f"model   {config.model_name_or_path}: {num_parameters / 1e6:,.2f}M parameters{lora}; "
            f"{device.type}{f' ({threads} threads)' if threads else ''}, "
            f"{describe_dtype(half)}, {kernel} attention"
        )
        if config.use_peft:
            held = f"; frozen weights in {config.quantization}" if quantised else ""
            say(f"lora    {lora_summary(model)}{held}")
    return model


def describe_dtype(half: torch.dtype | None) -> str:
    """Return the words for a format that forwards compute in; None: float32."""
    return f"{half} autocast".removeprefix("torch.") if half else "float32"


def place_of(name: str) -> tuple[str, dict[str, str]]:
    """Return what from_pretrained takes for the name of a model, which may be one of GGUF."""
    path = Path(name).expanduser()
    bare = path.is_dir() and not (path / "config.json").is_file()
    is_gguf = path.suffix.lower() == SUFFIX or (bare and any(path.glob(f"*{SUFFIX}")))
    return gguf_of(name) if is_gguf else (name, {})


def check_folder(name: str) -> None:
    """Refuse a folder that is no model, before it becomes a failed look-up at the Hub.

    Raises ConfigError for one that is missing, empty, a run, or holds pointers instead of weights.
    """
    if place_of(name)[1]:
        return
    looks_local = name.startswith((".", "/", "~")) or name.count("/") != 1
    if looks_local and not Path(name).is_dir() and "/" in name:
        raise ConfigError(
            f"--model_name_or_path: there is no folder {name}. "
            "Expected a folder with config.json and safetensors, or a Hub name (owner/name)."
        )
    folder = Path(name)
    if not folder.is_dir():
        return
    names = {path.name for path in folder.iterdir()}
    if not names & {"config.json", "adapter_config.json", "tokenizer_config.json"}:
        is_run = "config.yaml" in names
        raise ConfigError(
            f"--model_name_or_path: {name} "
            + (f"is a run folder. Its model is {name}/model." if is_run else "has no config.json.")
        )
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            if file.read(len(LFS_POINTER)) == LFS_POINTER:
                raise ConfigError(
                    f"--model_name_or_path: {path} is a git-lfs pointer, not the file itself. "
                    "Fetch it with: git lfs pull"
                )


@contextmanager
def _in_plain_words(name: str) -> Iterator[None]:
    """Turn the failure to find or fetch a model into one line that the user can act on."""
    try:
        yield
    except PosttrainError:
        raise
    except Exception as error:  # whatever a library thinks of a broken file
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        if not isinstance(error, (OSError, ValueError, ImportError)):
            reason = f"{type(error).__name__}: {reason}"
        raise ConfigError(
            f"--model_name_or_path: cannot load {name}: {reason} "
            "Expected a folder with config.json and safetensors, or a Hub name (owner/name)."
        ) from error


# How many CPU threads. Tiny operations end before a second thread has woken, and when another
# process holds its core they wait for it, so one thread is often faster than all.

SMALL = 20_000_000  # parameters, below which the probe is short and its outcome open
PROBE_TOKENS, PROBE_DOCUMENTS = 48, 32
ROUNDS = 3  # the best of each counts: another process may hold a core during one


def choose_threads(model: nn.Module) -> int:
    """Set torch's thread count to the faster of one and all, and return it.

    A short probe of training steps decides. The count stays as it is for models above SMALL
    parameters, and where OMP_NUM_THREADS is set.
    """
    size = sum(parameter.numel() for parameter in model.parameters())
    most = torch.get_num_threads()
    if most == 1 or size >= SMALL or "OMP_NUM_THREADS" in os.environ:
        return most
    seconds: dict[int, list[float]] = {1: [], most: []}
    for _ in range(ROUNDS):
        for threads, times in seconds.items():
            torch.set_num_threads(threads)
            times.append(_step_seconds(model))
    best = min(seconds, key=lambda threads: min(seconds[threads]))
    torch.set_num_threads(best)
    return best


def _step_seconds(model: nn.Module) -> float:
    vocabulary = model.get_input_embeddings().num_embeddings
    ids = [token % vocabulary for token in range(PROBE_TOKENS)]
    document = {"input_ids": ids, "trained": [False] + [True] * (PROBE_TOKENS - 1)}
    start = time.perf_counter()
    batch = pack_documents([document] * PROBE_DOCUMENTS, device="cpu")
    packed_logps(model, batch).logps.sum().backward()
    model.zero_grad()
    return time.perf_counter() - start
