"""`posttrain export` and `posttrain env`: the same model in other forms; facts without a path."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from posttrain.commands import env, export
from posttrain.models import to_gguf
from posttrain.models.ollama import go_template
from tests.conftest import make_model, make_tokenizer

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture
def adapter(tmp_path) -> Path:
    """A LoRA adapter that changes its base's output."""
    base, folder = tmp_path / "base", tmp_path / "adapter"
    make_model().save_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base)
    torch.manual_seed(1)
    model = get_peft_model(model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([[5, 6, 7, 8]])).logits


def test_an_exported_adapter_is_the_merged_model(adapter, tmp_path, capsys):
    export.main([str(adapter), "--to", "vllm", "--output_dir", str(tmp_path / "out")])
    assert f"vllm serve {tmp_path / 'out'}" in capsys.readouterr().out
    assert not (tmp_path / "out" / "adapter_config.json").exists()
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    plain = logits(base)
    expected = logits(PeftModel.from_pretrained(base, adapter))
    found = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    assert torch.allclose(found, expected, atol=1e-5)
    assert not torch.allclose(found, plain, atol=1e-5)
    with pytest.raises(SystemExit):
        export.main([str(adapter), "--to", "merged", "--output_dir", str(tmp_path / "out")])
    assert "output_dir: expected a new folder" in capsys.readouterr().err


def test_ollama_gets_weights_and_a_modelfile(adapter, tmp_path, monkeypatch):
    asked = []

    def convert(model, target, _folder, *, outtype):
        asked.append((json.loads((model / "config.json").read_text())["model_type"], outtype))
        target.write_bytes(b"GGUF")

    monkeypatch.setattr(to_gguf, "convert", convert)
    out = tmp_path / "out"
    flags = ["--template", "alpaca", "--dtype", "bfloat16"]
    export.main([str(adapter), "--to", "ollama", "--output_dir", str(out), *flags])
    assert asked == [("llama", "bf16")]
    text = (out / "Modelfile").read_text()
    assert text.startswith('FROM ./model.gguf\nTEMPLATE """Below is an instruction')
    assert '### Instruction:\n{{ .Prompt }}\n\n### Response:{{ .Response }}1"""' in text
    assert 'PARAMETER stop "1"' in text  # the number tokenizer's end of sequence


def test_a_chat_template_becomes_one_of_go():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHATML

    def render(turns):
        return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)

    assert go_template(tokenizer, render) == (
        "{{ if .System }}<|im_start|>system\n{{ .System }}<|im_end|>\n{{ else }}{{ end }}"
        "<|im_start|>user\n{{ .Prompt }}<|im_end|>\n<|im_start|>assistant\n"
        "{{ .Response }}<|im_end|>\n"
    )


def test_the_environment_has_versions_and_no_path(capsys, tmp_path):
    env.main([])
    printed = capsys.readouterr().out
    lines = dict(line.split(maxsplit=1) for line in printed.splitlines())
    assert lines["torch"] == torch.__version__
    assert {"posttrain", "python", "transformers", "memory", "cpu"} <= set(lines)
    assert str(Path.cwd()) not in printed
    info = tmp_path / "cpuinfo"
    info.write_text("processor: 0\nflags\t\t: fpu avx2 amx_bf16 fma\n")
    assert env.cpu_flags(info) == ["avx2", "fma", "amx_bf16"]
    with pytest.raises(SystemExit):
        env.main(["gpu"])
