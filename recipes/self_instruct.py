"""Self-Instruct and Alpaca: a teacher writes instructions from a few seed tasks.

    python recipes/self_instruct.py                          recorded answers, offline, seconds
    python recipes/self_instruct.py --teacher_url http://localhost:8000/v1 --num_records 52000
    python recipes/self_instruct.py --teacher_model my/model --method self_instruct

Reads seed tasks, writes the run folder: config.yaml, env.json, requests.jsonl (all that was asked
and answered, as it arrives), records.jsonl (instruction, input, output), rejected.jsonl (each with
its reason), report.json. A run that was stopped continues when it is started again, and asks
nothing twice. Then: python recipes/sft.py --dataset runs/self_instruct/records.jsonl

Alpaca: 20 tasks a request, 3 of them seeds. Self-Instruct (arXiv 2212.10560): instructions after 8
shown, then the type of each, then instances. Left out: training on the teacher's log-probs.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from posttrain.run.options import option, parse, plain_errors, say
from posttrain.run.settings import LookaheadName

if TYPE_CHECKING:
    from posttrain.self_instruct.asking import Budget
    from posttrain.self_instruct.methods import Collection, Method
    from posttrain.self_instruct.teacher import Teacher


@dataclass(kw_only=True)
class Config:
    """Settings of the recipe: the method, the teacher, the budget and the run folder."""

    method: Literal["alpaca", "self_instruct"] = option("alpaca", "method that makes the requests")
    seed_tasks: str = option("data/seed_tasks.jsonl", "file of the seed tasks")
    num_records: int = option(
        110, "stop asking at this number of records; requests under way still count", at_least=1
    )
    teacher_url: str | None = option(
        None, "URL of an OpenAI-compatible server, such as http://host:8000/v1"
    )
    teacher_model: str | None = option(
        None, "with teacher_url: name of the model there; without: folder or Hub name to run here"
    )
    teacher_key_variable: str = option(
        "TEACHER_API_KEY", "environment variable that holds the server's key"
    )
    teacher_replay: str = option(
        "data/self_instruct_replay.jsonl", "file of recorded answers, used without URL and model"
    )
    temperature: float | None = option(
        None, "sampling temperature; default: the method's own", at_least=0
    )
    concurrency: int = option(
        8, "number of requests sent at once, or batch size of a model run here", at_least=1
    )
    lookahead: LookaheadName = option(
        "none", "guess tokens to generate faster with a model run here, the same answers"
    )
    timeout_seconds: float = option(
        120.0, "seconds without a byte from the server after which a request is sent again", above=0
    )
    max_attempts: int = option(6, "number of times one request is sent before it fails", at_least=1)
    max_requests: int | None = option(
        None, "budget: number of requests, retries included", at_least=1
    )
    max_tokens: int | None = option(
        None, "budget: number of tokens of prompts and completions", at_least=1
    )
    max_cost: float | None = option(None, "budget: money, in the currency of the prices", above=0)
    prompt_price: float = option(0.0, "price of a million prompt tokens", at_least=0)
    completion_price: float = option(0.0, "price of a million completion tokens", at_least=0)
    seed: int = option(0, "seed of which tasks are shown, and of a model run here", at_least=0)
    output_dir: str = option("runs/self_instruct", "run folder")
    resume: bool = option(True, "continue the run in output_dir; no: move it aside and start anew")
    dry_run: bool = option(False, "say what would be asked, and ask nothing")


def main(config: Config) -> Collection:
    """Ask the teacher until there are enough records, then write the results to the run folder."""
    if config.dry_run:
        return describe(config)
    from posttrain.run.folder import open_run
    from posttrain.self_instruct.asking import Asker
    from posttrain.self_instruct.log import AnswerLog
    from posttrain.self_instruct.report import progress_line, write_results

    method, budget = make_method(config), make_budget(config)
    teacher = choose_teacher(config)
    log = Path(config.output_dir) / "requests.jsonl"
    # A run without a single answer has nothing to continue, so its folder is used anew.
    open_run(config.output_dir, config, resume=config.resume and log.exists())
    asker = Asker(teacher, AnswerLog(log), budget)
    for number, (request, answer) in enumerate(asker.ask(method.next_request), start=1):
        method.take(request, answer)
        if number % 10 == 0:
            say(progress_line(method, asker))
    write_results(log.parent, method, asker)
    return method.made


def describe(config: Config) -> Collection:
    """Say what the run would ask whom, show the first request, and ask nothing."""
    from posttrain.self_instruct import load_seed_tasks
    from posttrain.self_instruct.teacher import estimate_tokens

    method = make_method(config)
    make_budget(config)
    request = method.next_request()
    teacher = f"recorded answers of {config.teacher_replay}"
    if config.teacher_url or config.teacher_model:
        name = config.teacher_model or "the server's model"
        teacher = f"{name} at {config.teacher_url}" if config.teacher_url else f"{name}, run here"
    limits = ("max_requests", "max_tokens", "max_cost")
    limits = [f"{n} {getattr(config, n):,}" for n in limits if getattr(config, n) is not None]
    say(f"{config.seed_tasks}: {len(load_seed_tasks(config.seed_tasks)):,} seed tasks")
    say(f"first example, request {request.name}:\n{request.prompt}")
    say(f"steps   requests by {config.method} until {config.num_records:,} records are kept")
    say(
        f"tokens  about {estimate_tokens(request.prompt):,} of the prompt and at most "
        f"{request.max_tokens:,} of the answer in a request; budget: {', '.join(limits) or 'none'}"
    )
    say(f"engine  {teacher}, {config.concurrency} requests at once")
    say("dry run: nothing was asked and nothing written")
    return method.made


def make_method(config: Config) -> Method:
    """The method by its name, with the seed tasks."""
    from posttrain.self_instruct import Alpaca, SelfInstruct, load_seed_tasks

    methods = {"alpaca": Alpaca, "self_instruct": SelfInstruct}
    return methods[config.method](
        load_seed_tasks(config.seed_tasks),
        num_records=config.num_records,
        seed=config.seed,
        temperature=config.temperature,
    )


def make_budget(config: Config) -> Budget:
    """The budget; ConfigError for a limit on money without prices."""
    from posttrain.self_instruct.asking import Budget

    return Budget(
        max_requests=config.max_requests,
        max_tokens=config.max_tokens,
        max_cost=config.max_cost,
        prompt_price=config.prompt_price,
        completion_price=config.completion_price,
    )


def choose_teacher(config: Config) -> Teacher:
    """A server if there is a teacher_url, else a model on this machine, else a recording.

    The server's key is read from the environment only.
    """
    if config.teacher_url:
        from posttrain.self_instruct.server import ServerTeacher

        return ServerTeacher(
            config.teacher_url,
            model=config.teacher_model,
            key=os.environ.get(config.teacher_key_variable),
            concurrency=config.concurrency,
            timeout_seconds=config.timeout_seconds,
            max_attempts=config.max_attempts,
        )
    if config.teacher_model:
        from posttrain.self_instruct.local import LocalTeacher

        return LocalTeacher(
            config.teacher_model, batch_size=config.concurrency, lookahead=config.lookahead
        )

    from posttrain.self_instruct.log import ReplayTeacher

    return ReplayTeacher(config.teacher_replay)


if __name__ == "__main__":
    with plain_errors():
        main(parse(Config))
