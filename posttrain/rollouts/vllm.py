"""Answers drawn by vLLM through TRL's VLLMGeneration: on the trainer's own GPU, or by a server.

    engine = start_vllm(model, accelerator, tokenizer, max_model_length=576)      # "colocate"
    engine.sync(version)                     # the policy's weights, if they have moved since
    engine.generate(prompts, sampling, num_generations=16, seeds=seeds)

TRL's class starts the engine, brings it the weights (LoRA merged for the while, ZeRO-3 gathered
parameter by parameter) and talks to the server. Its own `generate` is not used: it has one seed for
all prompts of a call, so that answers to different prompts would share their random numbers.

vLLM's log-probs come from other kernels, and mostly other number formats, than the trainer's: train
with a correction (posttrain.losses.tis_weights). They are those of the distribution that was drawn
from (vLLM's `processed_logprobs`). Left out: tensor parallelism, vLLM's sleep mode.
"""

from __future__ import annotations

import math
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

from posttrain.errors import ConfigError
from posttrain.packed.half import restoring_half
from posttrain.rollouts.sampling import Completion, Sampling

REQUESTS_AT_ONCE = 64  # to a server; as many as TRL's client keeps connections
SERVER_SECONDS = 10.0  # how long a server may take to say that it is there
SERVER_COMMAND = (
    'VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --weight-transfer-config \'{"backend": "nccl"}\' '
    "--logprobs-mode processed_logprobs"
)

Drawn = tuple[list[int], list[float]]  # token ids of an answer, and their log-probs


def check_server(base_url: str) -> None:
    """ConfigError unless a vLLM server answers at this address."""
    try:
        with urllib.request.urlopen(f"{base_url}/health", timeout=SERVER_SECONDS):
            return
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"--vllm_server_base_url: expected a vLLM server at {base_url}, found none ({error}). "
            f"Start one with\n    {SERVER_COMMAND}"
        ) from None


class VLLMGenerator:
    """A Generator whose weights are its own, until `sync` brings it the policy's.

    generation: TRL's VLLMGeneration, over the policy and its accelerator. All ranks call `sync` and
    `generate` together, a rank without prompts too: a server is asked by the main process alone.
    """

    def __init__(self, generation: Any) -> None:
        self.generation, self.tokenizer = generation, generation.processing_class
        self.version: int | None = None  # that of the weights it has

    def sync(self, version: int) -> None:
        """Bring over the policy's weights; `version` tells whether they have moved."""
        if version != self.version:
            # TRL merges an adapter into the weights, sends them, and takes it out again.
            with restoring_half(self.generation.model):
                self.generation.sync_weights()
            self.version = version

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        num_generations: int,
        *,
        seeds: Sequence[int],
    ) -> list[list[Completion]]:
        """`num_generations` answers to each prompt; see posttrain.rollouts.sampling."""
        requests = [
            (list(prompt), _parameters(sampling, num_generations, seed))
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]
        ask = {"colocate": _ask_engine, "server": _ask_server}[self.generation.mode]
        return [
            [_completion(ids, logps, sampling, self.tokenizer) for ids, logps in siblings]
            for siblings in ask(self.generation, requests)
        ]


def start_vllm(
    model: Any,
    accelerator: Any,
    tokenizer: Any,
    *,
    max_model_length: int,
    mode: Literal["colocate", "server"] = "colocate",
    server_base_url: str = "http://localhost:8000",
    gpu_memory_utilization: float = 0.3,
) -> VLLMGenerator:
    """An engine for this policy: its own on each rank's GPU, or one server for all ranks.

    model: the policy, bare or PEFT, not yet wrapped. max_model_length: tokens of the longest prompt
    and answer together (colocate). gpu_memory_utilization: vLLM's share of the GPU's memory, which
    it keeps while the trainer trains (colocate). Raises ConfigError where a server is not to be
    had, or does not give the log-probs of what it draws from.
    """
    from trl.generation.vllm_generation import VLLMGeneration

    policy = (model, accelerator, tokenizer, mode)
    if mode == "colocate":
        memory = {"gpu_memory_utilization": gpu_memory_utilization}
        return VLLMGenerator(VLLMGeneration(*policy, max_model_length=max_model_length, **memory))
    server = {"server_base_url": server_base_url, "server_timeout": SERVER_SECONDS}
    try:
        generation = VLLMGeneration(*policy, **server)
    # Not reachable, without its development endpoints or weight transfer, or no CUDA device here.
    except (OSError, RuntimeError) as error:
        raise ConfigError(
            f"--vllm_server_base_url {server_base_url}: {error}\nA server is started with\n"
            f"    {SERVER_COMMAND}"
        ) from error
    if accelerator.is_main_process:
        _check_log_probs(generation.vllm_client)
    return VLLMGenerator(generation)


def _check_log_probs(client: Any) -> None:
    found = client.get_server_info()["model_config"]["logprobs_mode"]
    if found != "processed_logprobs":
        raise ConfigError(
            f"the vLLM server at {client.base_url}: expected --logprobs-mode processed_logprobs, "
            f"found {found}. Other log-probs are not those that it draws with, and every weight "
            "for the difference would be wrong."
        )


def _parameters(sampling: Sampling, num_generations: int, seed: int) -> dict[str, Any]:
    """The fields of vLLM's SamplingParams, for one prompt."""
    return {
        "n": num_generations,
        # vLLM adds 0 … n - 1 for the n answers; neighbouring prompts have neighbouring seeds.
        "seed": seed * num_generations,
        "temperature": sampling.temperature,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
        "min_tokens": sampling.min_tokens,
        "max_tokens": sampling.max_tokens,
        "stop_token_ids": list(sampling.stop_ids),
        "ignore_eos": True,  # the stop ids say what ends an answer, not the model's own config
        "stop": list(sampling.stop_strings),
        "include_stop_str_in_output": True,
        "skip_special_tokens": False,  # stop strings may hold some
        "logprobs": 0,  # of the drawn token alone
    }


def _ask_engine(generation: Any, requests: list[tuple[list[int], dict]]) -> list[list[Drawn]]:
    """This rank's own engine draws for all its prompts at once."""
    from trl.generation.vllm_generation import extract_logprobs
    from vllm import SamplingParams

    if not requests:
        return []
    outputs = generation.llm.generate(
        [{"prompt_token_ids": ids} for ids, _ in requests],
        sampling_params=[SamplingParams(**parameters) for _, parameters in requests],
        use_tqdm=False,
    )
    answers = []
    for output in outputs:
        logprobs, _ = extract_logprobs([output])
        ids = [list(answer.token_ids) for answer in output.outputs]
        answers.append(_drawn(ids, logprobs))
    return answers


def _ask_server(generation: Any, requests: list[tuple[list[int], dict]]) -> list[list[Drawn]]:
    """The main process sends all ranks' prompts, each as a request with its seed; the server
    works on them together."""
    from accelerate.utils import broadcast_object_list, gather_object

    accelerator = generation.accelerator
    everyone = gather_object([requests])

    def ask(request: tuple[list[int], dict]) -> list[Drawn]:
        ids, parameters = request
        # Repeated by name, as the client cuts its reply by it; what it does not know wins.
        found = generation.vllm_client.generate(
            [ids], n=parameters["n"], generation_kwargs=parameters
        )
        return _drawn(found["completion_ids"], found["logprobs"])

    reply: Any = None
    if accelerator.is_main_process:
        try:
            with ThreadPoolExecutor(REQUESTS_AT_ONCE) as pool:
                reply = [list(pool.map(ask, requests_of)) for requests_of in everyone]
        except Exception as error:  # for all ranks: the others wait for this one
            reply = f"{type(error).__name__}: {error}"
    (reply,) = broadcast_object_list([reply], from_process=0)
    if isinstance(reply, str):
        raise RuntimeError(f"the vLLM server did not answer a rollout: {reply}")
    return reply[accelerator.process_index]


def _drawn(ids: list[list[int]], logprobs: list[list[list[float | None]]]) -> list[Drawn]:
    """Answers with the log-prob of each token; NaN where vLLM has none."""
    return [
        (tokens, [math.nan if found[0] is None else found[0] for found in per_token])
        for tokens, per_token in zip(ids, logprobs, strict=True)
    ]


def _completion(
    ids: list[int], sampler_logps: list[float], sampling: Sampling, tokenizer: Any
) -> Completion:
    """With the policy's own log-probs unknown (NaN) where another distribution was drawn from."""
    own = [math.nan] * len(ids) if sampling.is_restricted else list(sampler_logps)
    reason = "stop" if _has_ended(ids, sampling, tokenizer) else "length"
    return Completion(ids, own, sampler_logps, reason)


def _has_ended(ids: list[int], sampling: Sampling, tokenizer: Any) -> bool:
    """Told by the tokens, since TRL's client keeps no finish reason."""
    if len(ids) < sampling.max_tokens or ids[-1] in sampling.stop_ids:
        return True
    text = tokenizer.decode(ids) if sampling.stop_strings else ""
    return any(string in text for string in sampling.stop_strings)
