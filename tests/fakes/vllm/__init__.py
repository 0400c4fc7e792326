"""As much of vLLM as TRL's VLLMGeneration and VLLMClient touch, on the CPU, with a plain HF model.

Names, arguments and replies are vLLM 0.30's. Completions are sampled one forward a token, by
transformers' own attention. Their random numbers are those of posttrain's decode loop for the same
seed (`seed // n`, row), so that runs by either can be compared token by token.
"""

from dataclasses import dataclass, field
from types import SimpleNamespace
from unittest.mock import patch

import torch

__version__ = "0.30.0"


@dataclass
class SamplingParams:
    n: int = 1
    seed: int | None = None
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    min_tokens: int = 0
    max_tokens: int = 16
    stop: list[str] = field(default_factory=list)
    stop_token_ids: list[int] = field(default_factory=list)
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    logprobs: int | None = None
    logit_bias: dict[int, float] | None = None

    def __post_init__(self) -> None:
        if self.temperature == 0 and self.n > 1:
            raise ValueError("n must be 1 when using greedy sampling")


@dataclass
class Logprob:
    logprob: float
    rank: int
    decoded_token: str | None = None


@dataclass
class CompletionOutput:
    index: int
    token_ids: list[int]
    logprobs: list[dict[int, Logprob]]
    finish_reason: str


@dataclass
class RequestOutput:
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]


class Worker:
    """The model of one GPU, with vLLM's `load_weights`, and how it samples."""

    def __init__(self, model: str) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.integrations import deepspeed

        # vLLM's models are its own: whole, also where the trainer's are sharded.
        with patch.object(deepspeed, "_hf_deepspeed_config_weak_ref", None):
            self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.loads: list[str] = []  # names of the tensors that were brought over
        self.requests: list[SamplingParams] = []

    @torch.no_grad()
    def load_weights(self, weights: list[tuple[str, torch.Tensor]]) -> None:
        parameters = dict(self.model.named_parameters())
        for name, weight in weights:
            parameters[name].copy_(weight)
            self.loads.append(name)

    def modules(self):
        return self.model.modules()

    @torch.no_grad()
    def sample(self, prompt: list[int], params: SamplingParams) -> RequestOutput:
        self.requests.append(params)
        numbers = torch.Generator().manual_seed((params.seed or 0) // params.n)
        uniform = torch.rand(params.n, params.max_tokens, generator=numbers)
        completions = [CompletionOutput(row, [], [], "length") for row in range(params.n)]
        stops = [*params.stop_token_ids, *([] if params.ignore_eos else [self._eos])]
        alive = list(completions)
        for step in range(params.max_tokens):
            ids = torch.tensor([[*prompt, *completion.token_ids] for completion in alive])
            masked = stops if step < params.min_tokens else []
            for completion, logits in zip(alive, self.model(ids).logits[:, -1], strict=True):
                processed = self.process(logits, params, masked)
                self._append(completion, processed, params, uniform[completion.index, step])
                if self._has_ended(completion, params, stops):
                    completion.finish_reason = "stop"
            alive = [completion for completion in alive if completion.finish_reason != "stop"]
            if not alive:
                break
        return RequestOutput(prompt, completions)

    @staticmethod
    def _append(completion, processed, params, uniform) -> None:
        if params.temperature:
            cumulative = processed.exp().cumsum(0)
            token = int(torch.searchsorted(cumulative, uniform * cumulative[-1], right=True))
        else:
            token = int(processed.argmax())
        rank = int((processed >= processed[token]).sum())
        completion.token_ids.append(token)
        completion.logprobs.append({token: Logprob(float(processed[token]), rank)})

    def _has_ended(self, completion, params, stops) -> bool:
        ids = completion.token_ids
        text = self.tokenizer.decode(ids, skip_special_tokens=params.skip_special_tokens)
        return ids[-1] in stops or any(string in text for string in params.stop)

    @property
    def _eos(self) -> int:
        return self.model.config.eos_token_id

    @staticmethod
    def process(logits, params, masked) -> torch.Tensor:
        """Log-probs of the sampled distribution: bias, temperature, min_tokens, top-k, top-p."""
        # A server is sent JSON, whose keys are text.
        bias = {int(token): value for token, value in (params.logit_bias or {}).items()}
        logits[list(bias)] += torch.tensor(list(bias.values()))
        logits = logits / (params.temperature or 1.0)
        logits[masked] = -torch.inf
        if params.top_k > 0:
            logits[logits < logits.topk(params.top_k).values[-1]] = -torch.inf
        if params.top_p < 1:
            ordered, places = logits.softmax(0).sort(descending=True)
            logits[places[ordered.cumsum(0) - ordered >= params.top_p]] = -torch.inf
        return logits.log_softmax(0)


class LLM:
    """The engine inside the trainer's process."""

    def __init__(self, model: str, **settings) -> None:
        self.settings = settings
        self.worker = Worker(model)
        runner = SimpleNamespace(model=self.worker)
        driver = SimpleNamespace(model_runner=runner)
        executor = SimpleNamespace(driver_worker=driver)
        self.llm_engine = SimpleNamespace(model_executor=executor)
        self.cache_resets = 0

    def reset_prefix_cache(self) -> None:
        self.cache_resets += 1

    def collective_rpc(self, method: str, kwargs: dict) -> None:
        assert method == "reload_weights"  # the way of a CPU, whose weights are packed
        self.worker.load_weights(kwargs["weights_iterator"])

    def generate(self, prompts, sampling_params, use_tqdm=True) -> list[RequestOutput]:  # noqa: ARG002
        if isinstance(sampling_params, SamplingParams):
            sampling_params = [sampling_params] * len(prompts)
        return [
            self.worker.sample(prompt["prompt_token_ids"], params)
            for prompt, params in zip(prompts, sampling_params, strict=True)
        ]
