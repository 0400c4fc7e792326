"""The card of a saved model: where it came from, what came of it, and how to use it.

    text = card_of(run_folder, model_folder, name="runs/dpo/model")

It is Markdown with the metadata that the Hugging Face Hub reads. Whatever a model or a data file
wrote stands in a block of code whose fence is longer than any in it, so it stays text.
"""

from __future__ import annotations

import json
import re
from itertools import groupby
from pathlib import Path
from typing import Any

import yaml

from posttrain.errors import ConfigError, DataError
from posttrain.report.charts import short
from posttrain.report.model import Estimate
from posttrain.report.run import Run, read_run
from posttrain.report.samples import shortened, text_of
from posttrain.report.verdict import headline_of

SAMPLES, SAMPLE_CHARS = 3, 1200
OF_HUB = re.compile(r"[\w.-]+(/[\w.-]+)?")
LICENSE_FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE")
# A setting that names data -> its word in the card.
DATA = {"dataset": "data", "eval_dataset": "held-out data"}

GENERATE = """\
import torch
from transformers import AutoTokenizer{both}

name = {name!r}
tokenizer = AutoTokenizer.from_pretrained(name)
model = {loader}.from_pretrained(name{labels})
"""
ASK = """\
inputs = tokenizer({prompt!r}, return_tensors="pt")
"""
ASK_CHAT = """\
messages = [{{"role": "user", "content": {prompt!r}}}]
inputs = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
)
"""
ANSWER = """\
output = model.generate(**inputs, max_new_tokens=128)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
"""
SCORE = """\
with torch.no_grad():
    print(model(**inputs).logits)
"""


def card_of(run_folder: str | Path, model_folder: str | Path, *, name: str) -> str:
    """Return the card of a run's model.

    Args:
        model_folder: Where the weights lie already.
        name: By which readers will load it: a folder, or a name on the Hub.
    """
    run, folder = _run_of(Path(run_folder)), Path(model_folder)
    parts = [
        _metadata(run, folder),
        f"# {run.name}",
        _origin(run),
        _outcome(run),
        _usage(run, folder, name),
        _samples(run),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _run_of(folder: Path) -> Run:
    """The run, also where it ended before its first log line."""
    try:
        return read_run(folder)
    except (ConfigError, DataError):
        config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
        environment = json.loads((folder / "env.json").read_text(encoding="utf-8"))
        return Run(folder, config, environment, [], [], [], (), is_finished=False)


def _metadata(run: Run, folder: Path) -> str:
    """The YAML header; a base model or data only where others can find them by that name."""
    is_adapter, is_classifier = _kind(folder)
    base, data = _on_hub(run.config.get("model_name_or_path")), run.config.get("dataset")
    values = {
        "library_name": "peft" if is_adapter else "transformers",
        "pipeline_tag": "text-classification" if is_classifier else "text-generation",
        "tags": ["posttrain", _method(run)],
        "base_model": base,
        "datasets": [data] if _is_hub_name(data) else None,
    }
    said = {key: value for key, value in values.items() if value}
    return f"---\n{yaml.safe_dump(said, sort_keys=False, allow_unicode=True)}---"


def _kind(folder: Path) -> tuple[bool, bool]:
    """Return whether a saved model is an adapter, and whether it gives scores, not tokens."""
    path = folder / "adapter_config.json"
    if path.is_file():
        return True, "CLS" in str(json.loads(path.read_text()).get("task_type"))
    path = folder / "config.json"
    classes = json.loads(path.read_text()).get("architectures") if path.is_file() else None
    return False, "Classification" in str(classes)


def _method(run: Run) -> str:
    return str(run.environment.get("trainer", "")).removesuffix("Trainer").lower() or "model"


def _is_hub_name(value: object) -> bool:
    return isinstance(value, str) and bool(OF_HUB.fullmatch(value)) and not Path(value).exists()


def _on_hub(model: object) -> str | None:
    """The model's name on the Hub; that of a folder's own card, where a folder has trained on."""
    if _is_hub_name(model):
        return str(model)
    card = Path(str(model)) / "README.md"
    if not card.is_file():
        return None
    found = _header(card.read_text(encoding="utf-8", errors="replace")).get("base_model")
    return found if _is_hub_name(found) else None


def _header(card: str) -> dict[str, Any]:
    """The metadata of a Markdown file; none if it has none that can be read."""
    match = re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)
    try:
        found = yaml.safe_load(match[1]) if match else None
    except yaml.YAMLError:
        return {}
    return found if isinstance(found, dict) else {}


def _origin(run: Run) -> str:
    """Name the starting model, the data and the command."""
    model, inputs = run.config.get("model_name_or_path"), run.environment.get("inputs", {})
    lines = [f"- trained by: posttrain, {_method(run)}, {run.last_step} steps"]
    base = _on_hub(model)
    if model:
        lines.append(f"- base model: {_code(base)}" if base else f"- base model: {_code(model)}")
        if base != model:
            lines[-1] += f" by way of the folder {_code(model)}" if base else ", a local folder"
            lines[-1] += _checksum(inputs.get("model_name_or_path"))
    for setting, word in DATA.items():
        if value := run.config.get(setting):
            lines.append(f"- {word}: {_code(value)}{_checksum(inputs.get(setting))}")
            lines[-1] += _license_of(value)
    lines.append("- command:")
    block = _block(str(run.environment.get("command", "")), "shell")
    settings = "All settings are in `config.yaml` of the run folder; running it again repeats it."
    return "\n".join(lines) + f"\n\n{block}\n\n{settings}"


def _checksum(entry: dict[str, str] | None) -> str:
    return f" (SHA-256 `{entry['sha256'][:16]}…`)" if entry else ""


def _license_of(data: str) -> str:
    """Say what the data's own folder says of its licence, or where the Hub says it."""
    if _is_hub_name(data):
        return f", licence on https://huggingface.co/datasets/{data}"
    folder = Path(data) if Path(data).is_dir() else Path(data).parent
    readme = folder / "README.md"
    if readme.is_file():
        text = readme.read_text(encoding="utf-8", errors="replace")
        said = _header(text).get("license")
        match = re.search(r"^licen[cs]e[^:\n]*: *([\w.+-]+\w)", text, re.IGNORECASE | re.MULTILINE)
        if said or match:
            return f", licence: {_code(said or match[1])}"
    if (folder / "pyproject.toml").exists() or (folder / ".git").exists():
        return ""  # the licence there is that of a program
    found = next((name for name in LICENSE_FILES if (folder / name).is_file()), None)
    return f", licence: in the file `{found}` beside it" if found else ""


def _outcome(run: Run) -> str:
    """The main metric before and after."""
    headline = headline_of(run, [])
    if headline.before is None or headline.after is None:
        return ""

    def cell(value: Estimate) -> str:
        text = short(value.value, is_share=headline.is_share)
        if value.low is None or value.high is None:
            return text
        ends = (short(end, is_share=headline.is_share) for end in (value.low, value.high))
        return f"{text} (95 %: {' to '.join(ends)})"

    return (
        f"## Result\n\n{headline.sentence}\n\n| | before | after |\n|---|---|---|\n"
        f"| {headline.of} | {cell(headline.before)} | {cell(headline.after)} |"
    )


def _usage(run: Run, folder: Path, name: str) -> str:
    """A snippet that loads the model and runs it."""
    is_adapter, is_classifier = _kind(folder)
    kind = "SequenceClassification" if is_classifier else "CausalLM"
    loader = f"AutoPeftModelFor{kind}" if is_adapter else f"AutoModelFor{kind}"
    labels = ", num_labels=1" if is_adapter and is_classifier else ""
    load = GENERATE.format(
        both=f"\nfrom peft import {loader}" if is_adapter else f", {loader}",
        loader=loader,
        name=name,
        labels=labels,
    )
    if not is_classifier:
        load = load.replace("import torch\n", "")
    is_chat = (folder / "chat_template.jinja").is_file()
    prompt = _prompts(run)[:1] or ["What is 2 + 2?"]
    ask = (ASK_CHAT if is_chat else ASK).format(prompt=prompt[0])
    return "## Use\n\n" + _block(load + ask + (SCORE if is_classifier else ANSWER), "python")


def _prompts(run: Run) -> list[str]:
    """Short texts that were asked last."""
    texts = [sample.get("prompt") for sample in reversed(run.samples)]
    asked = [text[-1].get("content") if isinstance(text, list) else text for text in texts if text]
    return [text for text in asked if isinstance(text, str) and len(text) <= 200]


def _samples(run: Run) -> str:
    """Completions of the last step that has any, one to each of a few prompts."""
    newest = max((sample.get("step", 0) for sample in run.samples), default=0)
    last = [sample for sample in run.samples if sample.get("step", 0) == newest]
    firsts = [next(group) for _, group in groupby(last, lambda sample: text_of(sample["prompt"]))]
    texts = []
    for sample in firsts[:SAMPLES]:
        prompt, completion = (
            shortened(text_of(sample.get(part)), SAMPLE_CHARS) for part in ("prompt", "completion")
        )
        score = sample.get("reward")
        scored = f", reward {score:.3g}" if isinstance(score, (int, float)) else ""
        texts.append(f"Prompt:\n\n{_block(prompt)}\n\nCompletion{scored}:\n\n{_block(completion)}")
    return "\n\n".join([f"## Samples of step {newest}", *texts]) if texts else ""


def _block(text: str, language: str = "text") -> str:
    """The text in a fence that is longer than any run of backticks in it."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def _code(value: object) -> str:
    """The value on one line, as code that ends where it should."""
    text = " ".join(str(value).split())
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    return f"`{text}`" if not longest else f"{'`' * (longest + 1)} {text} {'`' * (longest + 1)}"
