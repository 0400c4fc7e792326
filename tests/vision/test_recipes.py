"""SFT, DPO and GRPO of a vision-language model, from a file with images to a model that loads."""

import json
from importlib.util import find_spec

import pytest
import torch

from posttrain.errors import ConfigError
from recipes import dpo, grpo, sft
from tests.vision import tiny

pytest.importorskip("PIL")

USER = [{"role": "user", "content": "<image> 5 6"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model, and a file for each recipe, whose rows show two images in turn."""
    folder = tmp_path_factory.mktemp("vision")
    tiny.save_model(folder / "model")
    for place in range(2):
        tiny.save_image(folder / f"{place}.png", tiny.SIZES[place], seed=place)
    for name, columns in {
        "sft": {"prompt": USER, "completion": [tiny.answer("7 8")]},
        "dpo": {"prompt": USER, "chosen": [tiny.answer("7")], "rejected": [tiny.answer("8")]},
        "grpo": {"prompt": USER, "answer": "7"},
    }.items():
        rows = [{**columns, "images": [f"{place % 2}.png"]} for place in range(4)]
        tiny.write_rows(folder / f"{name}.jsonl", rows)
    (folder / "rewards.py").write_text(
        "def sevens(completions, *, images, **_):\n"
        "    assert all(image[0]['path'].endswith('.png') for image in images)\n"
        "    return [float(len(set(text.split()))) for text in completions]\n"
    )
    return folder


def settings(folder, name, **changes) -> dict:
    return {
        "model_name_or_path": str(folder / "model"),
        "output_dir": str(folder / "runs" / name),
        "dataset": str(folder / f"{name}.jsonl"),
        "template": "chat",
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "logging_steps": 1,
    } | changes


def metrics(folder, name) -> list[dict]:
    lines = (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines if '"loss"' in line]


def saved(folder, name):
    """The saved model and its processor, by transformers alone."""
    from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

    from posttrain.models.vision import load_processor

    path = folder / "runs" / name / "model"
    AutoTokenizer.from_pretrained(path)
    if find_spec("torchvision"):  # transformers makes a video processor beside
        AutoProcessor.from_pretrained(path)
    processor = load_processor(str(path))
    assert processor.image_processor.patch_size == 4
    return AutoModelForImageTextToText.from_pretrained(path, output_loading_info=True)


def test_sft_trains_on_images_and_saves_a_whole_model(folder, capsys):
    trainer = sft.main(sft.Config(**settings(folder, "sft")))
    assert "images  are seen by Qwen3VLForConditionalGeneration" in capsys.readouterr().out
    first, last = metrics(folder, "sft")
    assert last["loss"] < first["loss"]
    model, found = saved(folder, "sft")
    assert not any(found[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    weights = dict(trainer.model.named_parameters())
    for name, weight in model.named_parameters():
        torch.testing.assert_close(weight, weights[name], rtol=0, atol=0)
    before = tiny.make_start(folder / "model")
    assert not torch.equal(
        model.model.visual.blocks[0].attn.qkv.weight, before.model.visual.blocks[0].attn.qkv.weight
    )


def test_dpo_with_lora_reaches_both_towers_and_merges_when_a_run_starts_from_it(folder, capsys):
    # In half precision: frozen layers are then held so, and the check of images comes before.
    changes = {"use_peft": True, "lora_r": 2, "lora_alpha": 4, "dtype": "bfloat16"}
    dpo.main(dpo.Config(**settings(folder, "dpo", **changes)))
    said = capsys.readouterr().out
    assert "q_proj x2" in said
    assert "qkv x2" in said
    first, last = metrics(folder, "dpo")
    assert first["loss"] == pytest.approx(0.693147, abs=1e-5)
    assert last["loss"] < first["loss"]
    adapter = str(folder / "runs" / "dpo" / "model")
    again = settings(folder, "dpo", model_name_or_path=adapter, max_steps=1)
    dpo.main(dpo.Config(**again | {"output_dir": str(folder / "runs" / "again")}))
    assert saved(folder, "again")


def test_grpo_samples_with_images_and_its_ratio_starts_at_one(folder):
    reward = str(folder / "rewards.py") + ":sevens"
    own = {"num_generations": 2, "max_completion_length": 6, "rollout": "hf", "reward": reward}
    own |= {"reward_workers": 0, "format_weight": 0.0}
    grpo.main(grpo.Config(**settings(folder, "grpo", **own)))
    first, last = metrics(folder, "grpo")
    for line in (first, last):
        assert line["sampler_gap"] < 1e-5
        assert line["ratio_outside"] == 0
        assert line["grad_norm"] > 0
    sample = json.loads((folder / "runs" / "grpo" / "samples.jsonl").read_text().splitlines()[0])
    assert sample["prompt"].count("<|image_pad|>") == 1
    assert saved(folder, "grpo")


def test_grpo_by_an_engine_is_refused_for_prompts_with_images(folder):
    from functools import partial

    from common import make_rollouts

    from posttrain.models.vision import load_processor

    config = grpo.Config(**settings(folder, "grpo", num_generations=2))
    processor = partial(load_processor, config.model_name_or_path)
    tokenizer = tiny.make_tokenizer()
    common = {"advantage": lambda rewards: rewards, "processor": processor}
    with pytest.raises(ConfigError, match="expected hf with images"):
        make_rollouts(config, {"one": (print, 1.0)}, tokenizer, engine=print, **common)
