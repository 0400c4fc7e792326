"""The card of a model, from run folders written by hand."""

import json
import re

import pytest
import yaml
from huggingface_hub import ModelCard

from posttrain.report.card import card_of

HOSTILE = "```\n---\nlicense: mit\n---\n# Not a heading\n````text\n<script>alert(1)</script>"


@pytest.fixture
def make(tmp_path):
    """Write a run folder and a model folder, and return the card."""

    def made(*, config=None, samples=(), architectures=("LlamaForCausalLM",), name="m"):
        run, model = tmp_path / "dpo", tmp_path / "dpo" / "model"
        model.mkdir(parents=True, exist_ok=True)
        settings = {"model_name_or_path": "ann/base", "dataset": "ann/pairs", **(config or {})}
        (run / "config.yaml").write_text(yaml.safe_dump(settings))
        (run / "env.json").write_text(
            json.dumps({"trainer": "DPOTrainer", "command": "python recipes/dpo.py", "inputs": {}})
        )
        lines = [{"step": n, "loss": 1 / n, "pair_accuracy": n / 20} for n in range(1, 21)]
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        text = "".join(json.dumps(sample) + "\n" for sample in samples)
        (run / "samples.jsonl").write_text(text)
        (model / "config.json").write_text(json.dumps({"architectures": list(architectures)}))
        return ModelCard(card_of(run, model, name=name), ignore_metadata_errors=False)

    return made


def test_metadata_names_what_others_can_find(make):
    found = make(name="ann/dpo").data
    assert found.to_dict() == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["posttrain", "dpo"],
        "base_model": "ann/base",
        "datasets": ["ann/pairs"],
    }


def test_a_local_base_is_followed_to_its_own_base_on_the_hub(make, tmp_path):
    folder = tmp_path / "sft"
    folder.mkdir()
    (folder / "README.md").write_text("---\nbase_model: ann/base\n---\n\n# sft\n")
    card = make(config={"model_name_or_path": str(folder)})
    assert card.data.base_model == "ann/base"
    assert f"- base model: `ann/base` by way of the folder `{folder}`" in card.text
    (folder / "README.md").write_text("---\nbase_model: [\n---\n")
    card = make(config={"model_name_or_path": str(folder)})
    assert card.data.base_model is None
    assert f"- base model: `{folder}`, a local folder" in card.text


def test_the_result_stands_with_its_interval(make):
    text = make().text
    assert "| pair accuracy in training, first and last 3 log lines | 10 % (95 %: " in text
    assert " 95 % (" in text


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("README.md", "---\nlicense: cc-by-4.0\n---\n", ", licence: `cc-by-4.0`"),
        ("README.md", "# Data\n\nLicence of all files: Apache-2.0, as the code.\n", "`Apache-2.0`"),
        ("LICENSE", "Free.", ", licence: in the file `LICENSE` beside it"),
        ("notes.txt", "", None),
    ],
)
def test_the_licence_of_the_data_is_what_its_folder_says(file, content, said, make, tmp_path):
    (tmp_path / "pairs").mkdir()
    data = tmp_path / "pairs" / "pairs.jsonl"
    (tmp_path / "pairs" / file).write_text(content)
    data.write_text("{}")
    (line,) = [x for x in make(config={"dataset": str(data)}).text.splitlines() if "- data:" in x]
    assert said in line if said else ", licence" not in line


def test_the_licence_of_a_program_is_not_that_of_data_beside_it(make, tmp_path):
    for name in ("LICENSE", "pyproject.toml", "pairs.jsonl"):
        (tmp_path / name).write_text("{}")
    assert ", licence" not in make(config={"dataset": str(tmp_path / "pairs.jsonl")}).text


def test_nothing_that_a_model_wrote_leaves_its_block(make):
    sample = {"step": 3, "prompt": HOSTILE, "completion": HOSTILE, "reward": 0.5}
    card = make(samples=[{**sample, "step": 1, "prompt": "earlier"}, sample, sample])
    assert "license" not in card.data.to_dict()
    assert "earlier" not in card.text
    block = f"`````text\n{HOSTILE}\n`````"
    assert card.text.count(block) == 2  # prompt and completion of one sample, not of its sibling
    rest = re.sub(r"^(`{3,})\w+\n.*?^\1$", "", card.text, flags=re.MULTILINE | re.DOTALL)
    assert "<script>" not in rest
    assert "Not a heading" not in rest
    assert "Completion, reward 0.5:" in card.text


def test_a_scorer_is_loaded_as_one(make):
    card = make(architectures=["LlamaForSequenceClassification"])
    assert card.data.pipeline_tag == "text-classification"
    assert "AutoModelForSequenceClassification.from_pretrained(name)" in card.text
    assert "generate" not in card.text
