"""Evaluation of a saved model: every prompt once, greedy, the means that one gets by hand."""

import json
import random

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from posttrain import cli
from posttrain.commands import evaluate as evaluation
from posttrain.commands.evaluate import evaluate_model
from posttrain.data import load_prompts
from tests.conftest import EOS, make_model, random_ids

MAX_TOKENS = 9
NUM_PROMPTS = 10


@pytest.fixture
def model(tmp_path, number_tokenizer) -> str:
    """A saved model that ends some answers early and others not at all."""
    model = make_model(tie_word_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight[EOS] *= 3
    model.generation_config.eos_token_id = EOS
    model.save_pretrained(tmp_path)
    number_tokenizer.save_pretrained(tmp_path)
    return str(tmp_path)


@pytest.fixture
def rows() -> list[dict]:
    draw = random.Random(0)
    prompts = [random_ids(draw.randrange(2, 12), draw) for _ in range(NUM_PROMPTS)]
    return [
        {"prompt": " ".join(map(str, ids)), "answer": str(number)}
        for number, ids in enumerate(prompts)
    ]


def by_hand(model: str, rows: list[dict]) -> list[list[int]]:
    """Greedy answers of transformers itself, one prompt at a time."""
    loaded = AutoModelForCausalLM.from_pretrained(model)
    prompts = load_prompts(rows, AutoTokenizer.from_pretrained(model), template="plain")
    answers = []
    for prompt in prompts["prompt_ids"]:
        ids = torch.tensor([prompt])
        out = loaded.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=MAX_TOKENS, do_sample=False
        )
        answers.append(out[0, len(prompt) :].tolist())
    return answers


class Scorer:
    """Even answers score by their length, those of rows 3 and 7 cannot be scored."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, list[int]]] = []

    def __call__(self, completions, *, completion_ids, answer, **_) -> list[float | None]:  # noqa: ARG002
        self.seen += zip(answer, map(list, completion_ids), strict=True)
        return [
            None if gold in ("3", "7") else float(len(ids))
            for gold, ids in zip(answer, completion_ids, strict=True)
        ]


@pytest.mark.parametrize("batch_size", [4, 5, 256])
def test_each_prompt_counts_once_however_they_are_batched(model, rows, batch_size, monkeypatch):
    """The mean leaves out rows 3 and 7, which have no score; tokens include the end token."""
    monkeypatch.setattr(evaluation, "BATCH_SIZE", batch_size)
    scorer = Scorer()
    found = evaluate_model(
        model, rows, rewards={"length": (scorer, 1.0)}, template="plain", max_tokens=MAX_TOKENS
    )
    answers = by_hand(model, rows)
    lengths = [len(ids) for ids in answers]
    assert min(lengths) < MAX_TOKENS == max(lengths)
    assert scorer.seen == [(str(number), ids) for number, ids in enumerate(answers)]
    scored = [length for number, length in enumerate(lengths) if number not in (3, 7)]
    assert found["length"] == pytest.approx(sum(scored) / len(scored))
    assert found["mean_completion_tokens"] == pytest.approx(sum(lengths) / NUM_PROMPTS)


def test_sampling_draws_the_same_answers_again_and_others_than_greedy(model, rows):
    def seen(temperature: float) -> list:
        scorer = Scorer()
        evaluate_model(
            model, rows, rewards={"length": (scorer, 1.0)}, template="plain",
            max_tokens=MAX_TOKENS, temperature=temperature,
        )  # fmt: skip
        return scorer.seen

    assert seen(1.0) == seen(1.0)
    assert seen(1.0) != seen(0.0)


def test_the_command_prints_accuracy_format_and_tokens_of_a_saved_model(
    model, rows, tmp_path, capsys
):
    """The accuracy is the share of completions that a reward of the user's calls right."""
    problems = tmp_path / "problems.jsonl"
    problems.write_text("\n".join(map(json.dumps, rows)))
    reward = tmp_path / "my_rewards.py"
    reward.write_text(
        "def even_row(completions, *, answer, **_):\n"
        "    return [float(int(gold) % 2 == 0) for gold in answer]\n"
    )
    flags = ["--template", "plain", "--max_completion_length", str(MAX_TOKENS)]
    cli.main(
        ["evaluate", model, "--dataset", str(problems), "--reward", f"{reward}:even_row", *flags]
    )
    lengths = [len(ids) for ids in by_hand(model, rows)]
    shown = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["accuracy", "50.0%"] in shown
    assert ["format", "0.0%"] in shown
    assert ["mean_completion_tokens", f"{sum(lengths) / NUM_PROMPTS:.1f}"] in shown


def test_the_command_refuses_a_misspelt_reward_before_it_loads_the_model(capsys):
    with pytest.raises(SystemExit) as left:
        cli.main(["evaluate", "no/model", "--reward", "maths"])
    assert left.value.code == 2
    assert "Did you mean 'math'?" in capsys.readouterr().err
