"""Planned memory against what a real forward keeps; `posttrain plan`, `--dry_run`, completion."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from posttrain import cli
from posttrain.errors import ConfigError
from posttrain.models.tiny import tiny_llama_config
from posttrain.packed import forward
from posttrain.packed.batch import pack_documents
from posttrain.packed.forward import packed_logps
from posttrain.packed.memory import ENGINES, Setup, memory, most_tokens, peak, shape_of
from posttrain.packed.prepare import prepare
from recipes import dpo, r1_zero, rejection_sampling, self_instruct, sft
from tests.recipes.conftest import ROOT

SIZES = ((64, 2), (128, 4), (192, 6))  # hidden size, layers
TOKENS = 256


def config_of(hidden: int, layers: int) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=layers, vocab_size=512,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model")
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "data" / "tiny_tokenizer")
    LlamaForCausalLM(tiny_llama_config(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def kept_by_a_packed_forward(model: torch.nn.Module) -> int:
    """Bytes that autograd holds after a packed forward of TOKENS tokens on the CPU."""
    prepare(model)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept, alive = {}, []

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    document = {"input_ids": list(range(5, 69)), "trained": [False] + [True] * 63}
    batch = pack_documents([document] * (TOKENS // 64), device="cpu")
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        packed_logps(model, batch)
    return sum(kept.values())


@pytest.mark.parametrize("size", SIZES)
def test_planned_activations_are_within_15_percent_of_a_real_forwards(size):
    config = config_of(*size)
    planned = TOKENS * shape_of(config, half=False).per_token  # without the head's logits
    measured = kept_by_a_packed_forward(LlamaForCausalLM(config))
    assert planned == pytest.approx(measured, rel=0.15)


def test_the_plan_counts_weights_gradients_and_optimizer_as_torch_does():
    shape = shape_of(config_of(64, 2), half=False)
    numbers = sum(p.numel() for p in LlamaForCausalLM(config_of(64, 2)).parameters())
    parts = memory(shape, Setup(tokens=1))
    assert (parts["weights"], parts["gradients"], parts["optimizer"]) == (
        4 * numbers, 4 * numbers, 8 * numbers
    )  # fmt: skip
    # ZeRO's Table: 2 + 2 + 12 bytes a parameter in half precision, what is divided in eight.
    shape = shape_of(config_of(64, 2), half=True)
    states = {
        engine: sum(
            memory(shape, Setup(tokens=1, engine=engine, ranks=8))[part]
            for part in ("weights", "gradients", "optimizer")
        )
        for engine in ENGINES
    }
    assert states["ZeRO-1"] == (2 + 2 + 12 / 8) * numbers
    assert states["ZeRO-2"] == (2 + (2 + 12) / 8) * numbers
    assert states["ZeRO-3"] == 16 / 8 * numbers + 2 * 2 * shape.largest_layer


def test_on_a_cpu_what_was_freed_stays_and_counts_as_much_again():
    shape = shape_of(config_of(64, 2), half=False)
    on_gpu, on_cpu = (memory(shape, Setup(tokens=64, on_gpu=where)) for where in (True, False))
    passing = on_cpu["activations"] + on_cpu["head"]
    states = sum(on_cpu[part] for part in ("weights", "gradients", "optimizer"))
    assert peak(on_cpu) == states + 2 * passing
    assert peak(on_gpu) == states + on_gpu["activations"] + on_gpu["head"]


def test_the_most_tokens_fit_and_one_more_does_not():
    shape, budget = shape_of(config_of(64, 2), half=True), 64 * 2**20
    most = most_tokens(shape, Setup(tokens=1), budget)
    assert most > 0
    assert peak(memory(shape, Setup(tokens=most))) <= budget
    assert peak(memory(shape, Setup(tokens=most + 1))) > budget
    assert most_tokens(shape, Setup(tokens=1, checkpointing=True), budget) > most


def test_a_plan_names_the_cheapest_engine_that_fits(model, capsys):
    flags = ["sft", "--model_name_or_path", model, "--max_tokens_per_microbatch", "1024"]
    cli.main(["plan", *flags, "--gpus", "2", "--gpu_memory_gb", "80"])
    printed = capsys.readouterr().out.splitlines()
    labels = [line[:16].strip() for line in printed[2:9]]
    assert labels == [*ENGINES, "LoRA 16, DDP", "QLoRA 16, DDP"]
    assert printed[-1] == "cheapest that fits: DDP"


def test_a_plan_takes_the_trainers_default_on_gpus_and_says_so(model, monkeypatch, capsys):
    flags = ["plan", "sft", "--model_name_or_path", model]
    cli.main(flags)
    assert "16,384 tokens a forward (the default on GPUs), 8 GPUs" in capsys.readouterr().out
    monkeypatch.setattr(forward, "MOST_TOKENS", 96)  # the one place
    cli.main(flags)
    assert "96 tokens a forward (the default on GPUs), 8 GPUs" in capsys.readouterr().out
    cli.main([*flags, "--max_tokens_per_microbatch", "1024"])
    assert "1,024 tokens a forward, 8 GPUs" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["plan", "sfft"], "plan: expected a recipe first"),
        (["plan", "sft", "--gpus", "many"], "--gpus: expected a number, found 'many'."),
        (["plan", "sft", "--model_name_or_path", "/nowhere"], "no config of /nowhere"),
        (["run", "sftt"], "Did you mean 'sft'?"),
        (["recipes", "sft"], "recipes: expected no argument"),
        (["completion", "csh"], "completion: expected bash, zsh, fish, found 'csh'."),
    ],
)
def test_a_mistake_is_one_line(argv, message, capsys):
    with pytest.raises(SystemExit) as left:
        cli.main(argv)
    (line,) = capsys.readouterr().err.splitlines()
    assert left.value.code == 2
    assert message in line


@pytest.mark.parametrize("recipe", [sft, dpo, r1_zero])
def test_a_dry_run_says_all_and_writes_nothing(recipe, model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    output = tmp_path / "run"
    flags = {"model_name_or_path": model, "output_dir": str(output), "max_steps": 7}
    recipe.main(recipe.Config(**flags, dry_run=True))
    printed = capsys.readouterr().out
    assert "first example" in printed
    assert "steps   7 of " in printed
    for line in ("tokens  ", "engine  none, 1 processes, on cpu", "memory  about ", "nothing was"):
        assert line in printed
    assert not output.exists()


def test_a_dry_run_of_rejection_sampling_counts_what_it_would_sample(
    model, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(ROOT)
    output = tmp_path / "run"
    settings = {"model_name_or_path": model, "output_dir": str(output), "max_prompts": 70}
    config = rejection_sampling.Config(**settings, num_generations=4, dry_run=True)
    assert rejection_sampling.main(config) == {}
    printed = capsys.readouterr().out
    assert "first example" in printed
    # 70 = 32 + 32 + 6 prompts, 280 completions of at most 64 tokens
    assert "steps   3 batches of 32 prompts, 4 completions each: 280" in printed
    assert "tokens  at most 17,920 sampled" in printed
    for line in ("engine  the decode loop", "memory  about ", "kv cache", "dry run: "):
        assert line in printed
    assert not output.exists()


def test_a_dry_run_of_self_instruct_shows_what_would_be_asked_first(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    output = tmp_path / "run"
    url = "http://nowhere.invalid/v1"  # is not asked
    settings = {"output_dir": str(output), "teacher_url": url, "max_requests": 9, "seed": 0}
    self_instruct.main(self_instruct.Config(**settings, dry_run=True))
    printed = capsys.readouterr().out
    with open("data/self_instruct_replay.jsonl", encoding="utf-8") as file:
        first = json.loads(file.readline())  # with the same seed, the first request is the recorded
    assert first["request"]["prompt"].strip() in printed
    for line in ("152 seed tasks", "until 110 records", "max_requests 9", url, "nothing was asked"):
        assert line in printed
    assert not output.exists()


def test_a_dry_run_makes_no_model_that_is_missing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"is missing: run recipes/base\.py first"):
        sft.main(sft.Config(dry_run=True))
    assert list(tmp_path.iterdir()) == []


def completed(*words: str) -> list[str]:
    """The words that bash offers behind these, the last of which is begun."""
    script = subprocess.run(
        [sys.executable, "-m", "posttrain.cli", "completion", "bash"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    given = " ".join(f"'{word}'" for word in ("posttrain", *words))
    script += f"\nCOMP_WORDS=({given}); COMP_CWORD={len(words)}; _posttrain; echo ${{COMPREPLY[*]}}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    return done.stdout.split()


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
def test_bash_completes_commands_recipes_and_flags():
    assert completed("gen") == ["generate"]
    assert completed("run", "r1_") == ["r1_zero"]
    assert completed("run", "dpo", "--be") == ["--beta"]
    assert completed("run", "dpo", "--beta", "0.1", "--max_s") == ["--max_steps"]
