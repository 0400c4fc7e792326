"""Self-Instruct and Alpaca: a teacher writes instructions from a few seed tasks.

    python recipes/self_instruct.py                          recorded answers, offline, seconds
    python recipes/self_instruct.py --teacher_url http://localhost:8000/v1 --num_records 52000
    python recipes/self_instruct.py --teacher_model my/model --method self_instruct

Reads seed tasks, writes the run folder: config.yaml, env.json, requests.jsonl (all that was asked
and answered, as it arrives), records.jsonl (instruction, input, output), rejected.jsonl (each with
its reason), report.json. A run that was stopped goes on when it is started again, and asks
nothing twice. Then: python recipes/sft.py --dataset runs/self_instruct/records.jsonl

Alpaca: 20 tasks a request, 3 of them seeds. Self-Instruct (arXiv 2212.10560): instructions after 8
shown, then the type of each, then instances. Left out: training on the teacher's log-probs.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from posttrain.run.console import say
from posttrain.run.options import option, parse, plain_errors


@dataclass(kw_only=True)
class Config:
    method: Literal["alpaca", "self_instruct"] = option("alpaca", "how the teacher is asked")
    seed_tasks: str = option("data/seed_tasks.jsonl", "file of the seed tasks")
    num_records: int = option(
        110, "records at which no more is asked; answers under way still count", at_least=1
    )
    teacher_url: str | None = option(None, "OpenAI-compatible server, such as http://host:8000/v1")
    teacher_model: str | None = option(
        None, "with teacher_url the model's name there, else a folder or Hub name to run here"
    )
    teacher_key_variable: str = option(
        "TEACHER_API_KEY", "environment variable that holds the server's key"
    )
    teacher_replay: str = option(
        "data/self_instruct_replay.jsonl", "recorded answers, for neither a URL nor a model"
    )
    temperature: float | None = option(None, "of sampling; none: the method's own", at_least=0)
    concurrency: int = option(8, "requests under way together, or (local) in a batch", at_least=1)
    timeout_seconds: float = option(120.0, "longest silence of the server, in seconds", above=0)
    max_attempts: int = option(6, "how often one request is sent before it is given up", at_least=1)
    max_requests: int | None = option(None, "budget: requests, retries included", at_least=1)
    max_tokens: int | None = option(None, "budget: tokens of prompts and answers", at_least=1)
    max_cost: float | None = option(None, "budget: money, in the prices' currency", above=0)
    prompt_price: float = option(0.0, "price of a million prompt tokens", at_least=0)
    completion_price: float = option(0.0, "price of a million answer tokens", at_least=0)
    seed: int = option(0, "seed of which tasks are shown, and of a local teacher", at_least=0)
    output_dir: str = option("runs/self_instruct", "run folder")
    resume: bool = option(True, "go on with the run in output_dir; no: move it aside")


def main(config: Config):
    from posttrain.run.folder import open_run
    from posttrain.self_instruct import Alpaca, SelfInstruct, load_seed_tasks
    from posttrain.self_instruct.asking import Asker, Budget
    from posttrain.self_instruct.log import AnswerLog
    from posttrain.self_instruct.report import progress_line, write_results

    methods = {"alpaca": Alpaca, "self_instruct": SelfInstruct}
    method = methods[config.method](
        load_seed_tasks(config.seed_tasks),
        num_records=config.num_records,
        seed=config.seed,
        temperature=config.temperature,
    )
    budget = Budget(
        max_requests=config.max_requests,
        max_tokens=config.max_tokens,
        max_cost=config.max_cost,
        prompt_price=config.prompt_price,
        completion_price=config.completion_price,
    )
    teacher = choose_teacher(config)
    log = Path(config.output_dir) / "requests.jsonl"
    # A run that got no answer left nothing to go on with: its place is taken.
    open_run(config.output_dir, config, resume=config.resume and log.exists())
    asker = Asker(teacher, AnswerLog(log), budget)
    for number, (request, answer) in enumerate(asker.ask(method.next_request), start=1):
        method.take(request, answer)
        if number % 10 == 0:
            say(progress_line(method, asker))
    write_results(log.parent, method, asker)
    return method.made


def choose_teacher(config: Config):
    """A server if there is a teacher_url, else a model on this machine, else a recording.

    config: has the settings of recipes/self_instruct.py whose names begin with `teacher_`, and
    concurrency, timeout_seconds, max_attempts. The key is read from the environment only.
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

        return LocalTeacher(config.teacher_model, batch_size=config.concurrency)

    from posttrain.self_instruct.log import ReplayTeacher

    return ReplayTeacher(config.teacher_replay)


if __name__ == "__main__":
    with plain_errors():
        main(parse(Config))
