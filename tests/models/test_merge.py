"""Merging: formulas by hand, models that load again, and nothing silently mixed or overwritten."""

import json
from functools import partial

import pytest
import torch
from transformers import AutoModelForCausalLM

from posttrain.cli import main
from posttrain.errors import ConfigError
from posttrain.models.merge import linear, merge_models, slerp, task_arithmetic
from tests.conftest import make_model, make_tokenizer


def tensor(*values):
    return torch.tensor(values)


def test_linear_by_hand():
    """The golden merge of a long and a short model, half and half."""
    long, short = tensor([0.5, -1.0], [2.0, 0.0]), tensor([1.5, 1.0], [0.0, -4.0])
    merged = linear([long, short], weights=(0.5, 0.5))
    assert merged.tolist() == [[1.0, 0.0], [1.0, -2.0]]


def test_slerp_by_hand():
    """A third of a right angle is 30 degrees; (1, 0) and (0, 2) lie a right angle apart too."""
    assert slerp([tensor(1.0, 0.0), tensor(0.0, 1.0)], t=1 / 3).tolist() == pytest.approx(
        [3**0.5 / 2, 0.5]
    )
    halfway = slerp([tensor(1.0, 0.0), tensor(0.0, 2.0)], t=0.5)
    assert halfway.tolist() == pytest.approx([0.5**0.5, 2 * 0.5**0.5])


@pytest.mark.parametrize("pair", [((1.0, 2.0), (2.0, 4.0)), ((0.0, 0.0), (1.0, 1.0))])
def test_slerp_of_what_lies_on_a_line_is_the_mean(pair):
    first, second = map(torch.tensor, pair)
    assert slerp([first, second], t=0.25).tolist() == pytest.approx(
        (0.75 * first + 0.25 * second).tolist()
    )


def test_slerp_keeps_the_norm_that_averaging_loses():
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(2, 1000, generator=generator)
    second *= first.norm() / second.norm()
    assert slerp([first, second], t=0.5).norm() == pytest.approx(first.norm().item(), rel=1e-4)
    assert linear([first, second], weights=(0.5, 0.5)).norm() < 0.8 * first.norm()


def test_task_arithmetic_by_hand():
    merged = task_arithmetic([tensor(1.0), tensor(3.0), tensor(0.0)], weights=(1.0, 0.5))
    assert merged.tolist() == [2.5]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    for seed in range(3):
        model = make_model(seed=seed).to(torch.bfloat16)
        # Small shards: an index and several files, as large models have them.
        model.save_pretrained(root / str(seed), max_shard_size="20KB" if seed else "1GB")
        make_tokenizer().save_pretrained(root / str(seed))
    return [root / str(seed) for seed in range(3)]


@pytest.mark.parametrize("shard_bytes", [10_000, 1 << 30])
def test_a_merged_model_loads_and_holds_the_mean(shard_bytes, folders, tmp_path):
    combine = partial(linear, weights=(0.25, 0.75))
    number = merge_models(folders[:2], tmp_path / "out", combine, shard_bytes=shard_bytes)
    first, second, merged = (
        AutoModelForCausalLM.from_pretrained(path).state_dict()
        for path in (*folders[:2], tmp_path / "out")
    )
    assert number == len(list(merged))
    for name, value in merged.items():
        expected = 0.25 * first[name].float() + 0.75 * second[name].float()
        assert torch.equal(value, expected.to(torch.bfloat16)), name
    assert (tmp_path / "out/tokenizer.json").is_file()
    is_sharded = (tmp_path / "out/model.safetensors.index.json").exists()
    assert is_sharded == (shard_bytes == 10_000)
    assert not list((tmp_path / "out").glob("*.part"))


def test_models_that_differ_are_refused_and_nothing_is_left(folders, tmp_path):
    combine = partial(linear, weights=(0.5, 0.5))
    make_model(hidden_size=16, head_dim=4).save_pretrained(tmp_path / "narrow")
    make_model(num_hidden_layers=2).save_pretrained(tmp_path / "deep")
    with pytest.raises(ConfigError, match=r"shape \(97, 32\) in .* and \(97, 16\)"):
        merge_models([folders[0], tmp_path / "narrow"], tmp_path / "out", combine)
    with pytest.raises(ConfigError, match=r"differ in 9 tensors: 'model.layers.1"):
        merge_models([folders[0], tmp_path / "deep"], tmp_path / "out", combine)
    with pytest.raises(ConfigError, match="expected a model folder"):
        merge_models([folders[0], tmp_path], tmp_path / "out", combine)
    assert {path.name for path in tmp_path.iterdir()} == {"narrow", "deep"}


def test_the_command_merges_and_does_not_overwrite(folders, tmp_path, capsys):
    out = tmp_path / "out"
    models = ["--models", *map(str, folders[1:]), "--base", str(folders[0])]
    method = ["--method", "task_arithmetic", "--weights", "1", "-0.5"]
    argv = ["merge", *models, *method, "--output_dir", str(out)]
    main(argv)
    assert "task_arithmetic weights=[1.0, -0.5]" in capsys.readouterr().out
    before = json.loads((out / "config.json").read_text())
    assert "--weights 1 -0.5" in (out / "README.md").read_text()
    base, first, second, merged = (
        AutoModelForCausalLM.from_pretrained(path).get_output_embeddings().weight.float()
        for path in (*folders, out)
    )
    expected = base + (first - base) - 0.5 * (second - base)
    assert torch.equal(merged, expected.to(torch.bfloat16).float())
    with pytest.raises(SystemExit):
        main(argv)
    assert "exists already, and is not overwritten" in capsys.readouterr().err
    assert json.loads((out / "config.json").read_text()) == before


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--models", "a"], "expected at least two, found 1"),
        (["--models", "a", "b", "--weights", "1"], "one for each model (2), found 1"),
        (["--models", "a", "b", "c", "--method", "slerp"], "expected two models and one weight"),
        (["--models", "a", "b", "--base", "c"], "expected with --method task_arithmetic"),
        (["--models", "a", "b", "--method", "task_arithmetic"], "expected with --method"),
    ],
)
def test_settings_that_do_not_fit_are_refused(flags, message, capsys):
    with pytest.raises(SystemExit):
        main(["merge", *flags, "--output_dir", "out"])
    assert message in capsys.readouterr().err
