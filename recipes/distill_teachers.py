"""Glue of recipes/distill.py: from its settings to rows, a teacher, and a teacher's completions."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.errors import ConfigError, DataError
from posttrain.run.options import say

if TYPE_CHECKING:
    from datasets import Dataset
    from distill import Config
    from transformers import PreTrainedTokenizerBase

    from posttrain.self_instruct.teacher import Teacher as Writer
    from posttrain.trainers.teachers import Teacher

LOGPROBS = "teacher_logprobs.jsonl"


def load_rows(config: Config, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Load documents; prompts where the student writes every completion; or recorded rows."""
    from posttrain.data import load_documents, load_prompts

    if config.teacher == "recorded" and not config.teacher_url:
        return _recorded(config, tokenizer)
    template = template_of(config, tokenizer)
    if config.on_policy_share < 1:
        settings = {"template": template, "max_length": config.max_length}
        return load_documents(config.dataset, tokenizer, **settings)
    room = config.max_length - config.max_completion_length
    if room < 1:
        raise ConfigError(
            f"--max_length: expected more than --max_completion_length "
            f"({config.max_completion_length}), found {config.max_length}."
        )
    return load_prompts(config.dataset, tokenizer, template=template, max_prompt_length=room)


def template_of(config: Config, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the template; auto is the chat template, else Alpaca, for prompts too."""
    if config.template != "auto" or tokenizer.chat_template:
        return config.template
    return "alpaca"


def _recorded(config: Config, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    from datasets import Dataset

    from posttrain.trainers.teachers import check_recorded

    path = Path(config.dataset)
    if not path.is_file():
        raise DataError(f"--dataset: expected a file of recorded log-probs, found none at {path}.")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
    except ValueError as error:
        raise DataError(f"{path}: expected a JSON object in each line ({error}).") from None
    check_recorded(rows, len(tokenizer), str(path))
    kept = [row for row in rows if len(row["input_ids"]) <= config.max_length]
    say(f"data    {path}: {len(kept):,} recorded rows; {len(rows) - len(kept):,} too long, dropped")
    return Dataset.from_list(kept)


def make_teacher(config: Config, tokenizer: PreTrainedTokenizerBase, rows: Dataset) -> Teacher:
    """Load the teacher, or ask its server once."""
    from posttrain.trainers.teachers import AdapterOff, TopKTeacher

    if config.teacher_url:
        from posttrain.self_instruct.logprobs import LogprobServer

        rank = os.environ.get("RANK", "0")
        name = LOGPROBS if rank == "0" else f"{rank}_{LOGPROBS}"
        server = LogprobServer(
            config.teacher_url,
            top_k=config.top_k or 20,
            tokenizer=tokenizer,
            model=config.teacher_model,
            key=os.environ.get(config.teacher_key_variable),
            api=config.teacher_api,
            path=Path(config.output_dir) / name,
        )
        first = rows[0]
        server.check(first if "input_ids" in first else {"input_ids": first["prompt_ids"]})
        return TopKTeacher(server)
    if config.teacher == "recorded":
        return TopKTeacher()
    return AdapterOff() if config.teacher == "adapter_off" else _model_teacher(config, tokenizer)


def _model_teacher(config: Config, tokenizer: PreTrainedTokenizerBase) -> Teacher:
    from posttrain.models.load import load_for_inference, load_tokenizer
    from posttrain.run.settings import ModelConfig
    from posttrain.trainers.teachers import ModelTeacher, TextTeacher

    theirs = load_tokenizer(config.teacher)
    model = load_for_inference(
        ModelConfig(
            model_name_or_path=config.teacher,
            dtype=config.dtype,
            attn_implementation=config.attn_implementation,
        )
    )
    size = f"{model.num_parameters() / 1e6:,.2f}M parameters"
    if theirs.get_vocab() == tokenizer.get_vocab():
        say(f"teacher {config.teacher}: {size}, the student's tokenizer")
        return ModelTeacher(model)
    say(f"teacher {config.teacher}: {size}, another tokenizer: texts are compared, in spans")
    return TextTeacher(model, theirs, tokenizer)


# Completions by the teacher, for --method sft.


def taught_documents(config: Config, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Return the data's own completions, or have the teacher complete its prompts first."""
    from posttrain.data import load_documents

    template = template_of(config, tokenizer)
    settings = {"template": template, "max_length": config.max_length}
    source: Any = config.dataset
    if config.teacher_url or config.teacher != "given":
        source = _written(config, tokenizer, template)
    return load_documents(source, tokenizer, **settings)


def _written(
    config: Config, tokenizer: PreTrainedTokenizerBase, template: str
) -> list[dict[str, Any]]:
    """Conversations of the data's prompts and the teacher's completions.

    What it answered is in <output_dir>_teacher/requests.jsonl, and is not asked again.
    """
    from posttrain.data import load_prompts
    from posttrain.self_instruct.asking import Asker, Budget
    from posttrain.self_instruct.log import AnswerLog
    from posttrain.self_instruct.teacher import Request

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            "--method sft: one process asks the teacher. Start this command with python once, and "
            "train on the completions with accelerate launch recipes/sft.py."
        )
    room = config.max_length - config.max_completion_length
    prompts = load_prompts(
        config.dataset, tokenizer, template=template, max_prompt_length=room, keep_source=True
    )
    prompts = prompts.select(range(min(len(prompts), config.max_prompts or len(prompts))))
    writer, reads_rendered, name = _writer(config)
    conversations = [_messages(json.loads(source)) for source in prompts["source_prompt"]]
    rendered = prompts["prompt"]
    usable = [
        place
        for place, messages in enumerate(conversations)
        if reads_rendered or [turn["role"] for turn in messages] == ["user"]
    ]
    asked = iter(usable)

    def next_request() -> Request | None:
        place = next(asked, None)
        if place is None:
            return None
        text = rendered[place] if reads_rendered else conversations[place][0]["content"]
        settings = {"max_tokens": config.max_completion_length, "seed": config.seed}
        return Request(f"{name}-{place:07}", text, temperature=config.temperature, **settings)

    folder = Path(f"{config.output_dir}_teacher")
    folder.mkdir(parents=True, exist_ok=True)
    asker, rows, cut = Asker(writer, AnswerLog(folder / "requests.jsonl"), Budget()), [], 0
    for request, answer in asker.ask(next_request):
        if answer.finish_reason != "stop":
            cut += 1
            continue
        messages = conversations[int(request.name.rpartition("-")[2])]
        last = {"role": "assistant", "content": answer.text.strip()}
        rows.append({"messages": [*messages, last]})
    if asker.error:
        raise asker.error
    say(
        f"teacher {name}: {len(rows):,} completions of {len(prompts):,} prompts; {cut:,} cut off "
        f"or without an answer and {len(prompts) - len(usable):,} of several turns left out"
    )
    return rows


def _messages(prompt: str | list[dict[str, str]]) -> list[dict[str, str]]:
    return prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]


def _writer(config: Config) -> tuple[Writer, bool, str]:
    """Who writes, whether it reads prompts as the template renders them, and its name."""
    if config.teacher_url:
        from posttrain.self_instruct.server import ServerTeacher

        key = os.environ.get(config.teacher_key_variable)
        server = ServerTeacher(config.teacher_url, model=config.teacher_model, key=key)
        return server, False, config.teacher_model or "server"
    from posttrain.models.load import load_tokenizer
    from posttrain.self_instruct.local import LocalTeacher

    has_chat = bool(load_tokenizer(config.teacher).chat_template)
    return LocalTeacher(config.teacher, batch_size=32), not has_chat, config.teacher
