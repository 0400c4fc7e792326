"""`--dtype auto` on a CPU: a measurement decides, once a processor, and a resumed run keeps it."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
from transformers import LlamaConfig

from posttrain.models import number_format
from posttrain.models.number_format import bfloat16_share, settle_dtype


@dataclass
class Settings:
    model_name_or_path: str
    output_dir: str
    dtype: str = "auto"
    resume: bool = False


@pytest.fixture
def settings(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    LlamaConfig(hidden_size=320, intermediate_size=640).save_pretrained(tmp_path / "model")
    return Settings(str(tmp_path / "model"), str(tmp_path / "run"))


@pytest.mark.parametrize(("share", "dtype"), [(0.5, "bfloat16"), (0.9, "float32")])
def test_what_is_measured_decides_and_is_kept(settings, monkeypatch, tmp_path, share, dtype):
    asked = []
    monkeypatch.setattr(number_format, "_measure", lambda *shape: asked.append(shape) or share)
    settle_dtype(settings)
    assert settings.dtype == dtype
    settings.dtype = "auto"
    settle_dtype(settings)
    assert settings.dtype == dtype
    assert asked == [(320, 640)]
    assert list(json.loads((tmp_path / "cache/posttrain/bfloat16.json").read_text()).values()) == [
        share
    ]


def test_a_damaged_cache_is_measured_anew(settings, monkeypatch, tmp_path):
    monkeypatch.setattr(number_format, "_measure", lambda *_: 0.5)
    path = tmp_path / "cache" / "posttrain" / "bfloat16.json"
    path.parent.mkdir(parents=True)
    path.write_text("{")
    settle_dtype(settings)
    assert settings.dtype == "bfloat16"


def test_a_resumed_run_keeps_its_own(settings, monkeypatch, tmp_path):
    monkeypatch.setattr(number_format, "_measure", lambda *_: 0.5)
    settings.resume = True
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("max_steps: 3\ndtype: float32\nseed: 0\n")
    settle_dtype(settings)
    assert settings.dtype == "float32"


def test_several_ranks_and_unreadable_models_are_left_to_the_rule(settings, monkeypatch, tmp_path):
    monkeypatch.setattr(number_format, "_measure", lambda *_: 0.5)
    missing = Settings(str(tmp_path / "nowhere"), str(tmp_path / "run"))
    settle_dtype(missing)
    monkeypatch.setenv("WORLD_SIZE", "2")
    settle_dtype(settings)
    assert (missing.dtype, settings.dtype) == ("auto", "auto")


@pytest.mark.parametrize(
    ("about", "asked"),
    [
        ({"model_type": "gemma3n_text", "hidden_size": 320, "num_hidden_layers": 2}, [(320, 1280)]),
        ({"model_type": "llama", "hidden_size": "320"}, []),
    ],
)
def test_one_size_for_each_layer_and_sizes_that_are_none(settings, monkeypatch, about, asked):
    found = []
    monkeypatch.setattr(number_format, "_measure", lambda *shape: found.append(shape) or 0.5)
    (Path(settings.model_name_or_path) / "config.json").write_text(json.dumps(about))
    settle_dtype(settings)
    assert found == asked


@pytest.mark.usefixtures("settings")
def test_the_measurement_is_a_ratio_of_times():
    assert 0.02 < bfloat16_share(320, 640) < 50
