"""Evaluation of a saved model: every prompt once, greedy, the means that one gets by hand."""

import json
import random
from itertools import combinations
from statistics import mean

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from posttrain import cli
from posttrain.commands import evaluate as evaluation
from posttrain.commands.evaluate import evaluate_model
from posttrain.data import load_prompts
from posttrain.rewards.checks import load_reward
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


def test_several_samples_of_each_prompt_count_alike(model, rows):
    """Where all samples are greedy they are one answer, and so are the means."""
    arguments = {
        "rewards": {"length": (Scorer(), 1.0)}, "template": "plain", "max_tokens": MAX_TOKENS
    }  # fmt: skip
    once, thrice = (evaluate_model(model, rows, **arguments, num_samples=n) for n in (1, 3))
    assert thrice == pytest.approx(once)


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
    assert ["accuracy", "50.0%", "23.7%", "to", "76.3%", "Wilson"] in shown
    assert ["format", "0.0%", "0.0%", "to", "27.8%", "Wilson"] in shown
    tokens = f"{sum(lengths) / NUM_PROMPTS:.1f}"
    assert ["mean_completion_tokens", tokens] in [words[:2] for words in shown]


def test_several_samples_are_judged_problem_by_problem(model, rows, tmp_path, capsys, monkeypatch):
    """The command's pass@2 and best of 2 are means over the pairs of the samples that it drew."""
    (tmp_path / "problems.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "mine.py").write_text(
        "def even(completions, *, completion_ids, **_):\n"
        "    return [float(len(ids) % 2 == 0) for ids in completion_ids]\n"
        "def long(completions, *, completion_ids, **_):\n"
        "    return [float(len(ids)) for ids in completion_ids]\n"
    )
    own = {name: load_reward(f"{tmp_path}/mine.py:{name}", {}) for name in ("even", "long")}
    rewards = {"accuracy": (own["even"], 1.0), "score": (own["long"], 1.0)}
    drawn = evaluation.sample_problems(
        model, rows, rewards=rewards, template="plain", max_tokens=MAX_TOKENS, temperature=1.0,
        num_samples=3,
    )  # fmt: skip
    assert any(len(set(problem.lengths)) > 1 for problem in drawn)
    pairs = [list(combinations(problem.lengths, 2)) for problem in drawn]
    passed = mean(mean(min(n % 2 for n in pair) == 0 for pair in each) for each in pairs)
    best = mean(mean(max(pair) % 2 == 0 for pair in each) for each in pairs)

    monkeypatch.setattr(evaluation, "BATCH_SIZE", 7)  # two problems at a time
    flags = ["--template", "plain", "--max_completion_length", str(MAX_TOKENS), "--num_samples"]
    cli.main(
        ["evaluate", model, "--dataset", f"{tmp_path}/problems.jsonl", "--reward",
         f"{tmp_path}/mine.py:even", "--best_by", f"{tmp_path}/mine.py:long", *flags, "3"]
    )  # fmt: skip
    shown = {line.split()[0]: line.split()[1] for line in capsys.readouterr().out.splitlines()}
    assert shown["pass@2"] == f"{passed:.1%}"
    assert shown["best_of_2"] == f"{best:.1%}"
    assert shown["accuracy"] == f"{mean(mean(n % 2 == 0 for n in p.lengths) for p in drawn):.1%}"
    assert {"pass@3", "best_of_3"} <= shown.keys()
    assert "maj@3" not in shown  # no completion has a final answer


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num_samples", "4", "--k", "2", "8"], "k: expected 1 to --num_samples (4), found 8."),
        (["--num_samples", "4", "--k", "0"], "k: expected 1 to --num_samples (4), found 0."),
        (["--num_samples", "4", "--temperature", "0"], "temperature: expected above 0"),
        (["--prm", "some/model"], "prm: expected --num_samples above 1"),
        (["--num_samples", "2", "--prm", "x", "--best_by", "math"], "prm: expected one judge"),
        (["--num_samples", "2", "--best_by", "maths"], "best_by: expected math, code"),
    ],
)
def test_what_cannot_be_estimated_is_refused_in_one_line(flags, message, capsys):
    with pytest.raises(SystemExit) as left:
        cli.main(["evaluate", "no/model", *flags])
    assert left.value.code == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.strip().count("\n") == 0


def test_the_command_refuses_a_misspelt_reward_before_it_loads_the_model(capsys):
    with pytest.raises(SystemExit) as left:
        cli.main(["evaluate", "no/model", "--reward", "maths"])
    assert left.value.code == 2
    assert "Did you mean 'math'?" in capsys.readouterr().err
