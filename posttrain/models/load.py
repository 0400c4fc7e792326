"""Loading a tokenizer and a model that is ready to train.

tokenizer = load_tokenizer(config.model_name_or_path)
model = load_model(config)                       # config: posttrain.run.settings.ModelConfig

How many CPU threads: for a tiny model on a busy machine one is often faster than all.

Tiny operations end before a second thread has woken, and when another process holds its core they
wait for it. So for small models a short probe decides.
"""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from posttrain.errors import ConfigError
from posttrain.packed.batch import pack_documents
from posttrain.packed.forward import packed_logps
from posttrain.packed.prepare import prepare
from posttrain.run.console import say
from posttrain.run.engine import is_sharded, this_device, uses_half


def load_tokenizer(model_name_or_path: str):
    """The model's tokenizer. ConfigError when it has no end-of-sequence token: answers need one."""
    from transformers import AutoTokenizer

    _check_exists(model_name_or_path)
    with _plain_word(model_name_or_path):
        tokenizer = AutoTokenizer.from_pretrained(model_name_or_path)
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            f"the tokenizer of {model_name_or_path} has no end-of-sequence token, so no answer "
            "could ever end. Set `eos_token` in its tokenizer_config.json."
        )
    return tokenizer


def load_model(config, *, quiet: bool = False) -> nn.Module:
    """The causal LM at `config.model_name_or_path`: packed attention, LoRA on request.

    Weights are loaded in float32, the optimizer's master copy; half precision is autocast's
    business. A folder that holds a LoRA adapter is loaded on its base and merged.
    """
    from transformers import AutoModelForCausalLM
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    # After an earlier ZeRO-3 run in this process transformers would load empty, sharded weights.
    unset_hf_deepspeed_config()
    name = config.model_name_or_path
    _check_exists(name)
    with _plain_word(name):
        if (Path(name) / "adapter_config.json").is_file():
            from peft import AutoPeftModelForCausalLM

            model = AutoPeftModelForCausalLM.from_pretrained(name, dtype=torch.float32)
            model = model.merge_and_unload().requires_grad_(True)  # PEFT has frozen the base
        else:
            model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    return make_trainable(model, config, quiet=quiet)


def make_trainable(model: nn.Module, config, *, quiet: bool = False) -> nn.Module:
    """Move `model` to this process's device, prepare it for packed batches, add LoRA if asked."""
    device, half = this_device(), uses_half(config.dtype)
    if not is_sharded():  # DeepSpeed and FSDP place the parts themselves: no GPU need hold it all
        model.to(device)
    kernel = prepare(
        model, attn_implementation=config.attn_implementation, device=device, half=half
    )
    num_parameters = sum(p.numel() for p in model.parameters())
    if config.use_peft:
        model = with_lora(model, config)
    threads = choose_threads(model) if device.type == "cpu" else 0
    if not quiet:
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        lora = f", {trainable / 1e6:,.2f}M of them trained (LoRA)" if config.use_peft else ""
        say(
            f"model   {config.model_name_or_path}: {num_parameters / 1e6:,.2f}M parameters{lora}; "
            f"{device.type}{f' ({threads} threads)' if threads else ''}, "
            f"{'bfloat16 autocast' if half else 'float32'}, {kernel} attention"
        )
    return model


def with_lora(
    model: nn.Module, config, *, task_type: str = "CAUSAL_LM", trained_whole: tuple[str, ...] = ()
) -> nn.Module:
    """The model with LoRA adapters as `config` (a ModelConfig) says; layers named in
    `trained_whole` are trained, and saved with the adapter, themselves."""
    from peft import LoraConfig, get_peft_model

    targets = config.lora_target_modules or "all-linear"
    if not isinstance(targets, str):
        names = {name.rpartition(".")[2] for name, module in model.named_modules()}
        missing = sorted(set(targets) - names)
        if missing:
            raise ConfigError(
                f"--lora_target_modules: the model has no module named {', '.join(missing)}. "
                "Leave it out to adapt all linear layers."
            )
    lora = LoraConfig(
        task_type=task_type, r=config.lora_r, lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout, target_modules=targets,
        modules_to_save=list(trained_whole) or None,
    )  # fmt: skip
    # ScoringHead is no plain linear layer to PEFT's "all-linear", nor should it be adapted.
    with torch.random.fork_rng():
        torch.manual_seed(getattr(config, "seed", 0))  # RunConfig's; a bare ModelConfig has none
        return get_peft_model(model, lora)


def _check_exists(name: str) -> None:
    """A path that is missing gets a plain word, not a failed look-up at the hub."""
    looks_local = name.startswith((".", "/", "~")) or name.count("/") != 1
    if looks_local and not Path(name).is_dir() and "/" in name:
        raise ConfigError(
            f"--model_name_or_path: there is no folder {name}. "
            "Expected a folder with config.json and safetensors, or a Hub name (owner/name)."
        )


@contextmanager
def _plain_word(name: str) -> Iterator[None]:
    """What cannot be found or fetched is the user's to mend, in one line."""
    try:
        yield
    except OSError as error:
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(
            f"--model_name_or_path: cannot load {name}: {reason} "
            "Expected a folder with config.json and safetensors, or a Hub name (owner/name)."
        ) from None


SMALL = 20_000_000  # parameters, below which the probe is short and its answer open
PROBE_TOKENS, PROBE_DOCUMENTS = 48, 32
ROUNDS = 3


def choose_threads(model: nn.Module) -> int:
    """Set torch's thread count to the faster of one and all; returns it.

    Leaves it alone for models above SMALL parameters, and where OMP_NUM_THREADS is set.
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
