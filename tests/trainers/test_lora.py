"""LoRA in all three trainers: only the adapter trains, and what is saved can be used anywhere."""

import pytest
import torch

from posttrain.errors import ConfigError
from posttrain.models.load import load_model, make_trainable
from posttrain.packed.batch import pack_pairs
from posttrain.packed.forward import packed_logps
from posttrain.trainers.fit import fit, training_arguments
from tests.conftest import make_model
from tests.trainers.tiny import BATCH, KINDS, TRAINERS, Config, documents, logged, pairs, rl_trainer

SETTINGS = {"use_peft": True, "lora_r": 4, "lora_alpha": 8}


def config_for(base, folder, kind, **settings):
    return Config(
        model_name_or_path=str(base), output_dir=str(folder),
        per_device_train_batch_size=BATCH[kind], **{**SETTINGS, "max_steps": 3, **settings},
    )  # fmt: skip


@pytest.fixture(scope="module", params=KINDS)
def adapted(request, base, tmp_path_factory):
    """(kind, trainer, run folder) after three steps."""
    kind, folder = request.param, tmp_path_factory.mktemp(f"lora_{request.param}")
    config = config_for(base, folder, kind)
    own = {"beta": 1e-9} if kind == "rl" else {}
    trainer = TRAINERS[kind](load_model(config, quiet=True), training_arguments(config), **own)
    fit(trainer, config)
    return kind, trainer, folder


def test_only_adapter_weights_change(adapted):
    kind, trainer, _ = adapted
    before = make_model().state_dict()
    changed = 0
    for name, parameter in trainer.model.named_parameters():
        if "lora_" in name:
            assert parameter.requires_grad
            changed += "lora_B" in name and bool(parameter.abs().max() > 0)  # B starts at 0
            continue
        assert not parameter.requires_grad
        plain = name.removeprefix("base_model.model.").replace(".base_layer", "")
        assert torch.equal(parameter, before[plain]), (kind, plain)
    assert changed == 7  # linear layers; the head has none


def test_the_saved_adapter_reloads_everywhere_and_gives_the_trained_log_probs(adapted, base):
    """Saved alone; merged; through AutoModelForCausalLM; and as a starting model of ours."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    _, trainer, folder = adapted
    names = {path.name for path in (folder / "model").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= names
    assert "model.safetensors" not in names
    batch = pack_pairs(pairs(4).to_list(), device="cpu")
    trained = packed_logps(trainer.model.eval(), batch).logps
    untrained = packed_logps(load_model(Config(model_name_or_path=str(base)), quiet=True), batch)
    assert (trained - untrained.logps).abs().max() > 1e-3

    ours = load_model(Config(model_name_or_path=str(folder / "model")), quiet=True)
    assert not any("lora" in name for name, _ in ours.named_parameters())  # merged
    assert all(parameter.requires_grad for parameter in ours.parameters())
    auto = AutoModelForCausalLM.from_pretrained(folder / "model")
    merged = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base), folder / "model"
    ).merge_and_unload()
    torch.testing.assert_close(packed_logps(ours, batch).logps, trained, atol=1e-5, rtol=1e-5)
    ids = torch.tensor([pairs(1)[0]["prompt_ids"]])
    expected = trainer.model(ids).logits
    for model in (auto, merged):
        torch.testing.assert_close(model(ids).logits, expected, atol=1e-4, rtol=1e-4)


def test_an_adapter_is_a_starting_point_for_the_next_stage(adapted, tmp_path):
    """sft with LoRA, then dpo with LoRA on its folder: the first loss is log 2 at the new start."""
    _, _, folder = adapted
    config = config_for(folder / "model", tmp_path / "next", "dpo", max_steps=1)
    trainer = TRAINERS["dpo"](load_model(config, quiet=True), training_arguments(config))
    fit(trainer, config)
    assert logged(trainer, "loss")[0] == pytest.approx(0.693147, abs=1e-5)


def test_the_adapter_switched_off_is_the_reference(base, tmp_path):
    """The KL against it equals the KL against a frozen copy of the model, step by step."""
    curves = []
    for frozen_copy in (False, True):
        config = config_for(base, tmp_path, "rl")
        model = load_model(config, quiet=True)
        trainer = rl_trainer(model, training_arguments(config), beta=0.5)
        assert trainer.reference is None
        if frozen_copy:
            trainer.reference = load_model(Config(model_name_or_path=str(base)), quiet=True)
        trainer.train()
        curves.append(logged(trainer, "kl"))
    assert curves[0][0] == pytest.approx(0, abs=1e-7)
    assert curves[0][2] > 1e-4
    assert curves[0] == pytest.approx(curves[1], rel=1e-4, abs=1e-7)


def test_the_adapter_starts_from_the_seed_alone(base):
    starts = []
    for seed in (3, 3, 4):
        torch.rand(seed)  # whatever was sampled before
        model = load_model(config_for(base, "unused", "sft", seed=seed), quiet=True)
        starts.append(torch.cat([p.flatten() for p in model.parameters() if p.requires_grad]))
    assert torch.equal(starts[0], starts[1])
    assert not torch.equal(starts[0], starts[2])


def test_a_layer_that_the_model_does_not_have_is_refused(base):
    config = Config(model_name_or_path=str(base), use_peft=True, lora_target_modules=["q_prj"])
    with pytest.raises(ConfigError, match="the model has no module named q_prj"):
        make_trainable(make_model(), config, quiet=True)


def test_lora_of_chosen_layers_only(base):
    config = Config(model_name_or_path=str(base), use_peft=True, lora_target_modules=["q_proj"])
    model = make_trainable(make_model(), config, quiet=True)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == 2
    assert all("q_proj" in name for name in trained)


def test_lora_with_gradient_checkpointing_trains(base, tmp_path):
    """The frozen embedding's output needs no gradient, which checkpointing may trip over."""
    config = config_for(base, tmp_path, "sft", gradient_checkpointing=True)
    plain = config_for(base, tmp_path, "sft")
    curves = []
    for settings in (config, plain):
        model = load_model(settings, quiet=True)
        trainer = TRAINERS["sft"](model, training_arguments(settings), documents=documents(8))
        trainer.train()
        curves.append(logged(trainer, "loss"))
    assert curves[0] == curves[1]
    assert curves[0][2] < curves[0][0]
