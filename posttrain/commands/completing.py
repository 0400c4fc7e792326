"""A saved model that completes prompts: what `posttrain chat` and `posttrain generate` share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from posttrain.run.options import option
from posttrain.run.settings import ModelConfig

if TYPE_CHECKING:
    from datasets import Dataset

    from posttrain.data.read import Source
    from posttrain.rollouts.sampling import Sampling


@dataclass(kw_only=True)
class CompletingConfig:
    """Settings of how completions are sampled."""

    template: str = option(
        "auto", "prompt format: chat, alpaca, r1_zero, plain, …; auto: chat if the model has it"
    )
    max_completion_length: int = option(512, "tokens of the longest completion", at_least=1)
    max_prompt_length: int = option(4096, "tokens of the longest prompt", at_least=1)
    temperature: float = option(0.7, "sampling temperature; 0 is greedy", at_least=0)
    top_p: float = option(
        1.0, "sample from the most likely tokens of this share; 1: all", above=0, at_most=1
    )
    top_k: int = option(0, "sample from the k most likely tokens; 0 turns it off", at_least=0)
    seed: int = option(0, "seed of the sampling", at_least=0)


class Completer:
    """A model with its tokenizer, ready to complete prompts in one template."""

    def __init__(self, name: str, config: CompletingConfig) -> None:
        from posttrain.models.load import load_for_inference, load_tokenizer

        self.name, self.config = name, config
        self.tokenizer = load_tokenizer(name)
        self.model = load_for_inference(ModelConfig(model_name_or_path=name))

    def prompts(self, source: Source, say: Callable[[str], object] = lambda _: None) -> Dataset:
        """Render and encode prompts; see posttrain.data.load_prompts."""
        from posttrain.data import load_prompts

        return load_prompts(
            source,
            self.tokenizer,
            template=self.config.template,
            max_prompt_length=self.config.max_prompt_length,
            split=None,
            say=say,
        )

    @property
    def sampling(self) -> Sampling:
        """Return the settings that this model's completions are sampled with."""
        from posttrain.data.encode import num_ids, stop_ids_of
        from posttrain.rollouts.sampling import Sampling

        return Sampling(
            self.config.max_completion_length,
            stop_ids_of(self.name, self.tokenizer),
            self.config.temperature,
            top_p=self.config.top_p,
            top_k=self.config.top_k,
            vocabulary=num_ids(self.tokenizer),
        )

    def text(self, ids: Sequence[int]) -> str:
        """Return the text of token ids, without special tokens."""
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    @property
    def keeps_turns(self) -> bool:
        """True where the template takes a conversation, and not one question alone."""
        return self.config.template in ("chat", "plain") or (
            self.config.template == "auto" and bool(self.tokenizer.chat_template)
        )


def with_model_first(argv: list[str], flag: str = "--model") -> list[str]:
    """Let words before the first flag be the value of `flag`."""
    return [flag, *argv] if argv and not argv[0].startswith("-") else argv
