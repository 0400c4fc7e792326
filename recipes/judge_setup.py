"""A judge as a reward: `--reward my_judge.yaml`, in every recipe that scores completions by rules.

    url: http://localhost:8000/v1       # or, without it, a model on this machine
    model: Qwen/Qwen3-8B
    kind: pairwise
    rubric: A good answer is right, and says how one can know.

The file is read and the judge asked once before anything else; see docs/judges.md. What it answers
is in judgements.jsonl of the run folder, from which a resumed run reads it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from posttrain.errors import ConfigError
from posttrain.judges.prompts import RUBRIC
from posttrain.run.options import load, option, say

if TYPE_CHECKING:
    from posttrain.judges.judge import Judge
    from posttrain.self_instruct.teacher import Teacher


@dataclass(kw_only=True)
class JudgeConfig:
    """The settings in a judge's file."""

    url: str | None = option(None, "URL of an OpenAI-compatible server; none: a model here")
    model: str | None = option(None, "the model's name there, or a folder or Hub name here")
    key_variable: str = option("JUDGE_API_KEY", "environment variable that holds the server's key")
    kind: Literal["scalar", "pairwise"] = option(
        "scalar", "a score for each completion, or comparisons with others of its prompt"
    )
    rubric: str = option(RUBRIC, "what makes an answer good")
    rivals: int | None = option(
        None, "with pairwise: others that each is compared with; none: all", at_least=1
    )
    max_tokens: int = option(512, "tokens of a verdict at most, its thoughts included", at_least=1)
    temperature: float = option(0.0, "sampling temperature of verdicts", at_least=0)
    structured: bool = option(
        False, "have a vLLM server hold verdicts to their JSON schema (structured_outputs)"
    )
    concurrency: int = option(8, "requests at once, or batch size of a model here", at_least=1)
    timeout_seconds: float = option(
        120.0, "seconds without a byte after which a request is sent again", above=0
    )
    max_attempts: int = option(6, "number of times one request is sent", at_least=1)
    max_requests: int | None = option(
        None, "budget of each process: requests, retries included", at_least=1
    )
    token_budget: int | None = option(
        None, "budget of each process: tokens of prompts and verdicts", at_least=1
    )

    def check(self) -> None:
        """Raise ConfigError where there is no judge, or a setting of another kind."""
        if not (self.url or self.model):
            raise ConfigError("url: expected a server's URL, or a model to run here; found none.")
        if self.structured and not self.url:
            raise ConfigError("structured: expected a server's url with it, found none.")
        if self.rivals and self.kind != "pairwise":
            raise ConfigError("rivals: expected kind: pairwise with it, found scalar.")


def load_judge(path: str, output_dir: str) -> Judge:
    """Make the judge that a YAML file describes, and ask it once.

    Raises:
        ConfigError: Settings that cannot work.
        TeacherError: The judge gives no verdict.
    """
    from posttrain.judges.judge import PairwiseJudge, ScalarJudge
    from posttrain.judges.verdicts import Verdicts
    from posttrain.self_instruct.asking import Budget

    if not Path(path).is_file():
        raise ConfigError(f"--reward: expected a judge's YAML file, found none at {path}.")
    config = load(JudgeConfig, ["--config", path])
    rank = os.environ.get("RANK", "0")
    name = "judgements.jsonl" if rank == "0" else f"{rank}_judgements.jsonl"
    verdicts = Verdicts(
        _teacher(config, path),
        Budget(max_requests=config.max_requests, max_tokens=config.token_budget),
        path=Path(output_dir) / name,
        max_tokens=config.max_tokens,
        temperature=config.temperature,
        structured=config.structured,
    )
    if config.kind == "pairwise":
        judge = PairwiseJudge(verdicts, rubric=config.rubric, rivals=config.rivals)
    else:
        judge = ScalarJudge(verdicts, rubric=config.rubric)
    judge.probe(path)
    say(f"judge   {config.model or 'the server'} at {config.url or 'this machine'}: {config.kind}")
    return judge


def _teacher(config: JudgeConfig, path: str) -> Teacher:
    if config.url:
        from posttrain.self_instruct.server import ServerTeacher

        return ServerTeacher(
            config.url,
            model=config.model,
            key=os.environ.get(config.key_variable),
            concurrency=config.concurrency,
            timeout_seconds=config.timeout_seconds,
            max_attempts=config.max_attempts,
            setting=f"{path}: url",
        )
    from posttrain.self_instruct.local import LocalTeacher

    return LocalTeacher(config.model, batch_size=config.concurrency, setting=f"{path}: model")
