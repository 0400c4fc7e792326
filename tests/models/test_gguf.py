"""GGUF files as names of models: which file is meant, and what is said of a wrong one."""

import importlib.util

import pytest
import torch

from posttrain.errors import ConfigError
from posttrain.models.gguf import forget_quantisation, gguf_of
from posttrain.models.load import check_folder, load_tokenizer
from tests.conftest import make_model


def write(path, content=b"GGUF\x03\x00\x00\x00"):
    path.write_bytes(content)
    return path


def test_a_file_and_a_folder_with_one_are_the_same_model(tmp_path):
    path = write(tmp_path / "tiny.Q4_0.gguf")
    wanted = (str(tmp_path), {"gguf_file": "tiny.Q4_0.gguf"})
    assert gguf_of(str(path)) == gguf_of(str(tmp_path)) == wanted
    check_folder(str(path))


def test_a_folder_with_a_config_and_a_hub_name_are_left_alone(tmp_path):
    write(tmp_path / "tiny.gguf")
    (tmp_path / "config.json").write_text("{}")
    assert gguf_of(str(tmp_path)) == (str(tmp_path), {})
    assert gguf_of("owner/name") == ("owner/name", {})


def test_several_in_one_folder_are_named(tmp_path):
    write(tmp_path / "a.gguf")
    write(tmp_path / "b.gguf")
    with pytest.raises(ConfigError, match=r"holds several: a\.gguf, b\.gguf"):
        gguf_of(str(tmp_path))


@pytest.mark.parametrize("content", [b"version https://git-lfs", b"", b"PK\x03\x04"])
def test_a_file_that_is_none_is_refused(tmp_path, content):
    with pytest.raises(ConfigError, match="does not begin with GGUF"):
        gguf_of(str(write(tmp_path / "x.gguf", content)))


@pytest.mark.parametrize("name", ["nosuch.gguf", "models/nosuch.GGUF"])
def test_a_file_that_is_not_there_is_not_looked_up_elsewhere(name):
    with pytest.raises(ConfigError, match="there is no file"):
        check_folder(name)


def test_the_missing_package_is_named_with_its_installation(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(ConfigError, match=r"pip install 'posttrain\[gguf\]'"):
        gguf_of(str(write(tmp_path / "x.gguf")))


def test_a_damaged_file_is_one_line(tmp_path):
    with pytest.raises(ConfigError, match="cannot load"):
        load_tokenizer(str(write(tmp_path / "x.gguf")))


def test_a_model_without_its_marks_is_saved_as_any_other(tmp_path):
    model = make_model()
    model.config.quantization_config = {"quant_method": "gguf"}
    model.is_quantized = True
    forget_quantisation(model)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert torch.equal(again.model.norm.weight, model.model.norm.weight)
    assert "quantization_config" not in again.config.to_dict()
