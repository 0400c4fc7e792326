"""`posttrain generate` and `posttrain chat`: completions of the decode loop, and their looks."""

import io
import json
import sys

import pytest
import torch
from rich.console import Console

from posttrain.commands import chat, generate
from posttrain.packed.prepare import prepare
from posttrain.rollouts.generator import HFGenerator
from posttrain.rollouts.sampling import Sampling
from posttrain.rollouts.streaming import stream
from tests.conftest import make_model, make_tokenizer

HOSTILE = "[bold]5[/] <think>\x1b]0;title\x07 6</think> 7"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model")
    make_model().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_streamed_tokens_are_those_of_the_decode_loop(temperature):
    model = make_model()
    prepare(model)
    sampling = Sampling(12, (1,), temperature)
    for seed in range(3):
        ((whole,),) = HFGenerator(model).generate([[5, 6, 7]], sampling, seeds=[seed])
        assert list(stream(model, [5, 6, 7], sampling, seed)) == whole.token_ids


@torch.no_grad()
def test_between_two_tokens_the_model_computes_as_ever():
    """What a suspended generator sets in its context holds for whoever asked it for a token."""
    model, ids = make_model(), torch.tensor([[5, 6, 7]])
    prepare(model)
    before = model(ids).logits
    tokens = stream(model.train(), [5, 6, 7], Sampling(12, (1,), 0.0))
    next(tokens)
    assert model.training
    model.lm_head.weight += 1
    assert (model(ids).logits - before).abs().max() > 0.1
    tokens.close()


def test_a_file_of_prompts_becomes_a_line_for_each_completion(model, tmp_path, capsys):
    prompts, output = tmp_path / "prompts.txt", tmp_path / "out.jsonl"
    prompts.write_text("5 6 7\n\n8 9\n")
    flags = ["--template", "plain", "--max_completion_length", "6", "--num_generations", "2"]
    generate.main([model, "--dataset", str(prompts), "--output", str(output), *flags])
    records = [json.loads(line) for line in output.read_text().splitlines()]
    assert [(r["prompt"], r["number"]) for r in records] == [
        ("5 6 7", 0), ("5 6 7", 1), ("8 9", 0), ("8 9", 1)
    ]  # fmt: skip
    assert all(r["num_tokens"] <= 6 and r["ended"] in (True, False) for r in records)
    assert capsys.readouterr().out == ""
    guessed = ["--dataset", str(prompts), "--lookahead", "ngram"]
    generate.main([model, *guessed, *flags])
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == records
    with pytest.raises(SystemExit):
        generate.main([model, "--prompt", "5", "--output", str(output)])
    assert "expected a new file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "prompt: expected either --prompt or --dataset, found neither."),
        (["--prompt", "5", "--dataset", "x.txt"], "found both"),
        (["--dataset", "nowhere.txt"], "nowhere.txt: no such file."),
    ],
)
def test_a_mistake_in_generate_is_one_line(flags, message, model, capsys):
    with pytest.raises(SystemExit):
        generate.main([model, *flags])
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_thinking_is_dimmed_and_a_models_text_is_neither_markup_nor_control():
    text = chat.shown(HOSTILE, opened=False)
    assert text.plain == "[bold]5[/] <think>]0;title 6</think> 7"
    ((start, end, style),) = text.spans
    assert (text.plain[start:end], style) == ("<think>]0;title 6</think>", "dim")
    (span,) = chat.shown("6 7</think> 8", opened=True).spans
    assert "6 7</think> 8"[span.start : span.end] == "6 7</think>"


def talk(monkeypatch, lines: list[str], *argv: str) -> str:
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines) + "\n"))
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    chat.main([*argv, "--template", "plain", "--max_completion_length", "5", "--temperature", "0"])
    return sys.stdout.getvalue()


def test_a_conversation_keeps_its_turns_until_it_begins_anew(model, monkeypatch):
    asked = []
    answer = chat.Talk.answer

    def spy(self, question):
        asked.append(len(self.turns))
        return answer(self, question)

    monkeypatch.setattr(chat.Talk, "answer", spy)
    first, second, third = talk(
        monkeypatch, ["5 6", "7", "/new", "5 6", "/exit"], model
    ).splitlines()
    assert first == third != second
    assert len(first.split()) == 5


def test_two_models_stand_side_by_side(model):
    config = chat.Config(models=[model, model], template="plain", max_completion_length=4)
    talks = [chat.Talk(name, config) for name in config.models]
    console = Console(file=io.StringIO(), width=200)
    chat.print_two(console, talks, "5 6")
    cells = [line.split("│") for line in console.file.getvalue().splitlines() if "│" in line]
    assert all(left.strip() == right.strip() != "" for _, left, right, _ in cells)


def test_more_than_two_models_are_refused(capsys):
    with pytest.raises(SystemExit):
        chat.main(["a", "b", "c"])
    assert "models: expected one or two, found 3." in capsys.readouterr().err
