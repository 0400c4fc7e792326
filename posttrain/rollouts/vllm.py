"""Generate with vLLM through TRL's VLLMGeneration: on the trainer's own GPU, or by a server.

    engine = start_vllm(model, accelerator, tokenizer, max_model_length=576)      # "colocate"
    engine.sync(version)                     # the policy's weights, if they have moved since
    engine.generate(prompts, sampling, num_generations=16, seeds=seeds)

TRL's class starts the engine, brings it the weights (LoRA merged while they are sent, ZeRO-3
gathered parameter by parameter) and talks to the server. Its own `generate` is not used: it has one
seed for all prompts of a call, so completions of different prompts would share random numbers. Nor
is its way of sending weights where there is no CUDA: on a CPU vLLM packs its weights, and has to
load them anew; to a server they go through a folder that both see, if not over NCCL.

vLLM's log-probs come from other kernels, and mostly other number formats, than the trainer's: train
with an importance-sampling correction (posttrain.losses.tis_weights). They are log-probs in the
distribution that was sampled from (vLLM's `processed_logprobs`). Left out: tensor parallelism,
vLLM's sleep mode.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from posttrain.errors import ConfigError, PosttrainError
from posttrain.packed.half import restoring_half
from posttrain.rollouts.sampling import Completion, Sampling
from posttrain.rollouts.vllm_worker import refresh_heads

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import nn
    from transformers import PreTrainedTokenizerBase
    from trl.generation.vllm_client import VLLMClient
    from trl.generation.vllm_generation import VLLMGeneration

REQUESTS_AT_ONCE = 64  # to a server: the connections that TRL's client keeps
SERVER_SECONDS = 10.0  # timeout of a server's health check
RELOAD_SECONDS = 600.0  # in which a server reads new weights from a folder
SHARED_MEMORY = Path("/dev/shm")  # a folder in memory, which all processes of a machine see
SERVER_COMMAND = (
    'VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --weight-transfer-config \'{"backend": "nccl"}\' '
    "--logprobs-mode processed_logprobs"
)

FOLDER_COMMAND = (  # for weights that come through a folder
    "VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --logprobs-mode processed_logprobs "
    "--worker-extension-cls posttrain.rollouts.vllm_worker.Reloading"
)

Request = tuple[list[int], dict[str, Any]]  # a prompt's token ids, and fields of SamplingParams
Sampled = tuple[list[int], list[float]]  # token ids of a completion, and their log-probs


def check_server(base_url: str) -> None:
    """Raise ConfigError unless a vLLM server answers at this address."""
    try:
        with urllib.request.urlopen(f"{base_url}/health", timeout=SERVER_SECONDS):
            return
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"--vllm_server_base_url: expected a vLLM server at {base_url}, found none ({error}). "
            f"Start one with\n    {SERVER_COMMAND}"
        ) from None


class VLLMGenerator:
    """A Generator with a copy of the weights, which `sync` updates to the policy's.

    All ranks call `sync` and `generate` together, a rank without prompts too: only the main process
    talks to a server.

    Args:
        generation: TRL's VLLMGeneration, over the policy and its accelerator.
        push: Sends the weights; by default as TRL does.
    """

    def __init__(self, generation: VLLMGeneration, push: Callable[[], None] | None = None) -> None:
        self.generation, self.tokenizer = generation, generation.processing_class
        self._push = push or generation.sync_weights
        self.version: int | None = None  # the optimizer step of the weights that it has

    def sync(self, version: int) -> None:
        """Bring over the policy's weights, unless it has those of step `version` already."""
        if version != self.version:
            # TRL merges an adapter into the weights, sends them, and takes it out again.
            with restoring_half(self.generation.model):
                self._push()
            self.version = version

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        num_generations: int,
        *,
        seeds: Sequence[int],
    ) -> list[list[Completion]]:
        """Sample `num_generations` completions of each prompt; see posttrain.rollouts.sampling."""
        rows = self.generation.model.config.get_text_config().vocab_size
        outside = range(sampling.vocabulary or rows, rows)  # of the tokenizer
        requests = [
            (list(prompt), _parameters(sampling, num_generations, seed, outside))
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]
        ask = {"colocate": _ask_engine, "server": _ask_server}[self.generation.mode]
        return [
            [_completion(ids, logps, sampling, self.tokenizer) for ids, logps in siblings]
            for siblings in ask(self.generation, requests)
        ]


def start_vllm(
    model: nn.Module,
    accelerator: Accelerator,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_model_length: int,
    mode: Literal["colocate", "server"] = "colocate",
    server_base_url: str = "http://localhost:8000",
    sync_folder: str | None = None,
    gpu_memory_utilization: float = 0.3,
    dtype: str = "auto",
) -> VLLMGenerator:
    """Start an engine for this policy: its own on each rank's device, or one server for all ranks.

    Args:
        model: The policy, bare or PEFT, not yet wrapped.
        max_model_length: Tokens of the longest prompt and completion together (colocate).
        gpu_memory_utilization: vLLM's share of the GPU's memory, which it keeps while the trainer
            trains (colocate).
        sync_folder: Folder through which weights go to the server, which has to see it under the
            same path. None: over NCCL, and where the trainer has no GPU, shared memory.
        dtype: Number format in which the engine computes, such as the trainer's (colocate); a
            server has its own `--dtype`.

    Raises:
        ConfigError: The server does not answer, or its log-probs are not those of the distribution
            that it samples from.
    """
    from trl.generation import vllm_client, vllm_generation

    policy, on_cpu = (model, accelerator, tokenizer, mode), not _on_cuda(accelerator)
    if mode == "colocate":
        if on_cpu:  # vLLM would bind this process's threads, which train, to single cores
            os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        settings = {"dtype": dtype, **({"enforce_eager": True} if on_cpu else {})}
        # TRL gives no number format, and vLLM would take half precision for float32 weights.
        with _replaced(vllm_generation, "LLM", partial(vllm_generation.LLM, **settings)):
            generation = vllm_generation.VLLMGeneration(
                *policy,
                max_model_length=max_model_length,
                gpu_memory_utilization=gpu_memory_utilization,
            )
        return VLLMGenerator(generation, partial(_reload, generation) if on_cpu else None)
    server = {"server_base_url": server_base_url, "server_timeout": SERVER_SECONDS}
    through_folder = on_cpu or sync_folder is not None
    join = (lambda *_, **__: None) if through_folder else vllm_client.VLLMClient.init_communicator
    try:
        with _replaced(vllm_client.VLLMClient, "init_communicator", join):
            generation = vllm_generation.VLLMGeneration(*policy, **server)
    # The server is not reachable, or lacks its development endpoints or weight transfer.
    except (OSError, RuntimeError) as error:
        raise ConfigError(
            f"--vllm_server_base_url {server_base_url}: {error}\nA server is started with\n"
            f"    {FOLDER_COMMAND if through_folder else SERVER_COMMAND}"
        ) from error
    if accelerator.is_main_process:
        _check_log_probs(generation.vllm_client)
    push = partial(_through_folder, generation, server_base_url, sync_folder)
    return VLLMGenerator(generation, push if through_folder else None)


def builds_for_cpu() -> bool:
    """True if the vLLM that is installed computes on CPUs."""
    with suppress(PackageNotFoundError):
        return bool(version("vllm-cpu"))
    with suppress(PackageNotFoundError):
        return version("vllm").endswith("+cpu")
    return False


def _on_cuda(accelerator: Accelerator) -> bool:
    return accelerator.device.type == "cuda"


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


# TRL merges an adapter only while the weights are read; so what is kept is a copy.


def _reload(generation: VLLMGeneration) -> None:
    """Let the engine in this process load the weights anew, into the layout that it computes in."""
    weights = ((name, weight.clone()) for name, weight in generation._iter_named_params())
    generation.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
    refresh_heads(generation.llm.llm_engine.model_executor.driver_worker.model_runner.model)
    generation.llm.reset_prefix_cache()


def _through_folder(generation: VLLMGeneration, base_url: str, sync_folder: str | None) -> None:
    """Write the weights to a folder and let the server read them; all ranks call it together."""
    from safetensors.torch import save_file

    is_main = generation.accelerator.is_main_process
    params = generation._iter_named_params()  # a collective: every rank reads all of them
    weights = {name: w.to("cpu", copy=True).contiguous() for name, w in params if is_main}
    if is_main:
        parent = sync_folder or (SHARED_MEMORY if SHARED_MEMORY.is_dir() else None)
        folder = tempfile.mkdtemp(prefix="posttrain-weights-", dir=parent)
        try:
            save_file(weights, Path(folder) / "model.safetensors", metadata={"format": "pt"})
            call = {"method": "reload_from", "kwargs": {"folder": folder}}
            _post(f"{base_url}/collective_rpc", call)
            _post(f"{base_url}/reset_prefix_cache", None)
        finally:
            shutil.rmtree(folder)
    generation.accelerator.wait_for_everyone()


def _post(url: str, content: dict[str, Any] | None) -> None:
    data = b"" if content is None else json.dumps(content).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=RELOAD_SECONDS):
            return
    except OSError as error:
        raise PosttrainError(
            f"the vLLM server did not take new weights ({url}: {error}). It has to see the folder "
            "of the weights under the same path (--vllm_sync_folder). Start it with\n    "
            f"{FOLDER_COMMAND}\nand the run again with --resume."
        ) from None


def _check_log_probs(client: VLLMClient) -> None:
    found = client.get_server_info()["model_config"]["logprobs_mode"]
    if found != "processed_logprobs":
        raise ConfigError(
            f"the vLLM server at {client.base_url}: expected --logprobs-mode processed_logprobs, "
            f"found {found}. Other log-probs are not those that it samples with, and every "
            "importance-sampling weight would be wrong."
        )


def _parameters(
    sampling: Sampling, num_generations: int, seed: int, outside: range
) -> dict[str, Any]:
    """Fields of vLLM's SamplingParams, for one prompt. outside: ids that are never sampled."""
    return {
        "n": num_generations,
        # vLLM adds 0 … n - 1 for the n completions; neighbouring prompts have neighbouring seeds.
        "seed": seed * num_generations,
        "temperature": sampling.temperature,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
        "min_tokens": sampling.min_tokens,
        "max_tokens": sampling.max_tokens,
        "stop_token_ids": list(sampling.stop_ids),
        "ignore_eos": True,  # completions end at our stop ids, not at those of the model's config
        "stop": list(sampling.stop_strings),
        "include_stop_str_in_output": True,
        "skip_special_tokens": False,  # stop strings may contain some
        "logprobs": 0,  # of the sampled token alone
        "logit_bias": dict.fromkeys(outside, -100.0) or None,  # the least that vLLM takes
    }


def _ask_engine(generation: VLLMGeneration, requests: list[Request]) -> list[list[Sampled]]:
    """Generate all completions of this rank with its own engine, in one call."""
    from trl.generation.vllm_generation import extract_logprobs
    from vllm import SamplingParams

    if not requests:
        return []
    outputs = generation.llm.generate(
        [{"prompt_token_ids": ids} for ids, _ in requests],
        sampling_params=[SamplingParams(**parameters) for _, parameters in requests],
        use_tqdm=False,
    )
    completions = []
    for output in outputs:
        logprobs, _ = extract_logprobs([output])
        ids = [list(completion.token_ids) for completion in output.outputs]
        completions.append(_sampled(ids, logprobs))
    return completions


def _ask_server(generation: VLLMGeneration, requests: list[Request]) -> list[list[Sampled]]:
    """Generate with the server: the main process sends the prompts of all ranks, each as a request
    with a seed of its own, and the server batches them."""
    from accelerate.utils import broadcast_object_list, gather_object

    accelerator = generation.accelerator
    everyone = gather_object([requests])

    def ask(request: Request) -> list[Sampled]:
        ids, parameters = request
        # `n` is given twice: the client splits its reply by the argument, and the server reads
        # generation_kwargs, which override it.
        found = generation.vllm_client.generate(
            [ids], n=parameters["n"], generation_kwargs=parameters
        )
        return _sampled(found["completion_ids"], found["logprobs"])

    reply: Any = None
    if accelerator.is_main_process:
        try:
            with ThreadPoolExecutor(REQUESTS_AT_ONCE) as pool:
                reply = [list(pool.map(ask, requests_of)) for requests_of in everyone]
        except Exception as error:  # sent to all ranks, which wait for this one
            where = generation.vllm_client.base_url  # which this rank alone knows
            reply = f"the vLLM server at {where} failed to generate a rollout: {error}"
    (reply,) = broadcast_object_list([reply], from_process=0)
    if isinstance(reply, str):
        raise PosttrainError(f"{reply}. Start it, and the run again with --resume.")
    return reply[accelerator.process_index]


def _sampled(ids: list[list[int]], logprobs: list[list[list[float | None]]]) -> list[Sampled]:
    """Join the completions of a prompt with their log-probs; NaN where vLLM has none."""
    return [
        (tokens, [math.nan if found[0] is None else found[0] for found in per_token])
        for tokens, per_token in zip(ids, logprobs, strict=True)
    ]


def _completion(
    ids: list[int],
    sampler_logps: list[float],
    sampling: Sampling,
    tokenizer: PreTrainedTokenizerBase,
) -> Completion:
    """Make a Completion; the policy's own log-probs are unknown (NaN) where top-k, top-p or
    min_tokens restricted the distribution."""
    own = [math.nan] * len(ids) if sampling.is_restricted else list(sampler_logps)
    reason = "stop" if _has_ended(ids, sampling, tokenizer) else "length"
    return Completion(ids, own, sampler_logps, reason)


def _has_ended(ids: list[int], sampling: Sampling, tokenizer: PreTrainedTokenizerBase) -> bool:
    """True unless the completion was truncated; TRL's client keeps no finish reason."""
    if len(ids) < sampling.max_tokens or ids[-1] in sampling.stop_ids:
        return True
    text = tokenizer.decode(ids) if sampling.stop_strings else ""
    return any(string in text for string in sampling.stop_strings)
