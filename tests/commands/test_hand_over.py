"""`posttrain eval --lm_eval`: what lm-eval is started with; a stub stands for the package."""

import json
import sys
from pathlib import Path

import pytest

from posttrain import cli

STUB = "import json, os, sys\njson.dump(sys.argv[1:], open(os.environ['TOLD'], 'w'))\n"


@pytest.fixture
def told(tmp_path, monkeypatch) -> Path:
    """The file in which the stub leaves its arguments."""
    package = tmp_path / "packages" / "lm_eval"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text(STUB)
    monkeypatch.syspath_prepend(str(package.parent))
    monkeypatch.setenv("PYTHONPATH", str(package.parent))
    monkeypatch.setenv("TOLD", str(tmp_path / "told.json"))
    return tmp_path / "told.json"


def test_lm_eval_gets_the_model_and_the_tasks(told):
    cli.main(["eval", "runs/x/model", "--lm_eval", "gsm8k", "ifeval"])
    assert json.loads(told.read_text()) == [
        "--model", "hf", "--model_args", "pretrained=runs/x/model",
        "--batch_size", "auto", "--tasks", "gsm8k,ifeval",
    ]  # fmt: skip


def test_an_adapter_goes_over_its_base(told, tmp_path):
    about = {"base_model_name_or_path": "owner/base"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(about))
    cli.main(["eval", str(tmp_path), "--lm_eval", "gsm8k"])
    found = json.loads(told.read_text())[3]
    assert found == f"pretrained=owner/base,peft={tmp_path},tokenizer={tmp_path}"


def test_without_the_package_the_error_names_it(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(SystemExit):
        cli.main(["eval", "runs/x/model", "--lm_eval", "gsm8k"])
    assert "pip install lm-eval" in capsys.readouterr().err
