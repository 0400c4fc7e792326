"""A teacher on this machine: a model folder or Hub name, through our own decode loop.

teacher = LocalTeacher("my/model", batch_size=8)
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from posttrain.data.chat import ChatTemplate
from posttrain.data.encode import Encoder, num_ids
from posttrain.data.example import Example, user
from posttrain.models.beside import heads_beside
from posttrain.models.load import load_model, load_tokenizer
from posttrain.rollouts.generator import HFGenerator
from posttrain.rollouts.options import lookahead_of
from posttrain.rollouts.sampling import Completion, Sampling
from posttrain.run.options import say
from posttrain.run.settings import LookaheadName, ModelConfig
from posttrain.self_instruct.teacher import Answer, Request, TeacherError

SEED_BITS = 63  # what torch's generator takes


class LocalTeacher:
    """Answers `batch_size` requests together, each sampled with the hash of its content as seed.

    The prompt goes through the tokenizer's chat template if it has one, else in as it stands.
    Temperature, top_p and stop texts apply; the presence penalty does not. setting: where the user
    named the model, for messages.
    """

    calls_at_once = 1

    def __init__(
        self,
        model_name_or_path: str,
        *,
        batch_size: int = 8,
        lookahead: LookaheadName = "none",
        setting: str = "--teacher_model",
    ) -> None:
        self.requests_per_call = batch_size
        self.name, self.setting = model_name_or_path, setting
        self._tokenizer = load_tokenizer(model_name_or_path)
        self._encoder = Encoder(self._tokenizer)
        has_chat = bool(getattr(self._tokenizer, "chat_template", None))
        self._template = ChatTemplate(self._tokenizer) if has_chat else None
        model = load_model(ModelConfig(model_name_or_path=model_name_or_path))
        self._positions = getattr(model.config, "max_position_embeddings", None)
        ahead = lookahead_of(lookahead, partial(heads_beside, model_name_or_path))
        self._generator = HFGenerator(model, tokenizer=self._tokenizer, lookahead=ahead)
        say("teacher samples with temperature and top_p; presence_penalty is not used")

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        """One answer to each; TeacherError for a prompt that the model has no room for."""
        answers: dict[str, Answer] = {}
        # The decode loop takes one setting a batch.
        for settings in dict.fromkeys(map(_settings, requests)):
            alike = [request for request in requests if _settings(request) == settings]
            answers |= dict(zip([r.name for r in alike], self._generate(alike), strict=True))
        return [answers[request.name] for request in requests]

    def close(self) -> None:
        """Do nothing: calls here end by themselves."""

    def _generate(self, requests: Sequence[Request]) -> list[Answer]:
        """One answer to each request; all have the same settings."""
        prompts = self._encode(requests)
        longest = max(map(len, prompts))
        max_tokens = requests[0].max_tokens
        if self._positions:
            max_tokens = min(max_tokens, self._positions - longest)
        if max_tokens < 1:
            raise TeacherError(
                f"{self.setting} {self.name}: a prompt has {longest:,} tokens, the model "
                f"{self._positions:,} positions. Choose one with a longer context."
            )
        sampling = Sampling(
            max_tokens,
            tuple(self._encoder.end_ids),
            requests[0].temperature,
            stop_strings=requests[0].stop,
            top_p=requests[0].top_p,
            vocabulary=num_ids(self._tokenizer),
        )
        seeds = [int(request.key, 16) % 2**SEED_BITS for request in requests]
        completions = self._generator.generate(prompts, sampling, 1, seeds=seeds)
        return [
            self._read(request, len(prompt), completion)
            for request, prompt, (completion,) in zip(requests, prompts, completions, strict=True)
        ]

    def _encode(self, requests: Sequence[Request]) -> list[list[int]]:
        texts = [request.prompt for request in requests]
        if self._template is None:
            return self._encoder.prompts(texts, add_bos=True)
        turns = [Example(where=request.name, turns=(user(request.prompt),)) for request in requests]
        texts = [self._template.prompt(self._encoder.as_text(example)) for example in turns]
        return self._encoder.prompts(texts, add_bos=self._template.adds_bos)

    def _read(self, request: Request, prompt_tokens: int, completion: Completion) -> Answer:
        text = self._tokenizer.decode(completion.token_ids, skip_special_tokens=True)
        places = [place for stop in request.stop if (place := text.find(stop)) >= 0]
        reason = "stop" if places else completion.finish_reason
        text = text[: min(places)] if places else text
        return Answer(text, reason, prompt_tokens, len(completion.token_ids))


def _settings(request: Request) -> tuple[float, float, int, tuple[str, ...]]:
    """The settings that all requests of a batch must share."""
    return request.temperature, request.top_p, request.max_tokens, request.stop
