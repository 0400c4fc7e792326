"""The load-balancing loss of mixtures of experts: transformers' value and gradient, and its log."""

import copy

import pytest
import torch
from datasets import Dataset

from benchmarks.families import tiny_model
from posttrain.errors import ConfigError
from posttrain.packed.prepare import prepare
from posttrain.packed.router import RouterWatch, balancing_function, routers_of
from tests.conftest import EOS, make_model
from tests.trainers.tiny import arguments, documents, dpo_trainer, logged, sft_trainer

COEF = 0.1
FAMILIES = ["mixtral", "qwen3_moe", "gpt_oss", "granitemoe", "olmoe", "jamba"]  # the last by rows


def one_document(length: int = 23) -> Dataset:
    ids = [*torch.arange(length - 1).mul(7).remainder(50).add(3).tolist(), EOS]
    return Dataset.from_dict({"input_ids": [ids], "trained": [[False] + [True] * (length - 1)]})


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradient_are_those_of_transformers(family, tmp_path):
    model = tiny_model(family)
    plain = copy.deepcopy(model).train()
    ids = torch.tensor(one_document()["input_ids"])
    plain.config.router_aux_loss_coef = plain.router_aux_loss_coef = COEF
    theirs = plain(input_ids=ids, labels=ids, output_router_logits=True, use_cache=False)
    theirs.loss.backward()
    prepare(model, router_aux_loss_coef=COEF)
    trainer = sft_trainer(model, arguments(tmp_path), documents=one_document())
    part = list(one_document())
    ours = trainer._part_loss(model.train(), part, part) / trainer.count_items(part)
    ours.backward()
    assert ours.item() == pytest.approx(theirs.loss.item(), rel=1e-5)
    assert trainer.metrics.reduce()["router_aux_loss"] == pytest.approx(theirs.aux_loss.item())
    gradients = [dict(m.named_parameters()) for m in (model, plain)]
    for name, weight in gradients[1].items():
        if weight.grad is not None:
            gap = (gradients[0][name].grad - weight.grad).norm()
            assert gap <= 1e-4 * weight.grad.norm() + 1e-9, name


def test_padding_counts_for_nothing_and_a_shared_prompt_once(tmp_path):
    """A model by rows pads them, and computes a pair's prompt in each; packed it does neither."""
    seen = []
    for rows in (False, True):
        model = tiny_model("qwen3_moe")
        kernel = prepare(
            model, attn_implementation="rows" if rows else "auto", router_aux_loss_coef=COEF
        )
        assert (kernel == "rows") == rows
        trainer = dpo_trainer(model, arguments(tmp_path / str(rows)))
        part = [trainer.train_dataset[i] | {"reference": [0.0, 0.0]} for i in range(3)]
        trainer._part_loss(model, part, part)
        seen.append(trainer.metrics.reduce())
    for name in ("router_aux_loss", "busiest_expert"):
        assert seen[0][name] == pytest.approx(seen[1][name], rel=1e-5)
    assert 1 < seen[0]["busiest_expert"] <= 8


@pytest.mark.parametrize("family", ["qwen3_moe", "llama4_text", "zaya"])
@pytest.mark.parametrize("how", ["auto", "rows"])
def test_activation_checkpoints_change_nothing(family, how, tmp_path):
    """A hook inside one may compute nothing."""
    found = []
    for checkpointing in (False, True):
        model = tiny_model(family)
        prepare(model, attn_implementation=how)
        args = arguments(tmp_path, activation_checkpointing=checkpointing, max_steps=1)
        trainer = sft_trainer(model, args)
        trainer.train()
        found.append([logged(trainer, name) for name in ("loss", "grad_norm", "busiest_expert")])
    for plain, again in zip(*found, strict=True):
        assert plain == pytest.approx(again, rel=1e-4)


def test_a_router_that_gives_places_of_tokens_does_not_stop_a_run(tmp_path):
    """JetMoe's whole numbers are no experts."""
    model = tiny_model("jetmoe")
    prepare(model)
    trainer = sft_trainer(model, arguments(tmp_path, max_steps=1))
    trainer.train()
    assert 1 <= logged(trainer, "busiest_expert")[0] <= 4


def test_training_evens_the_load_and_says_so(tmp_path):
    ends = []
    for coef in (0.0, 1.0):
        model = tiny_model("mixtral")
        prepare(model, router_aux_loss_coef=coef)
        trainer = sft_trainer(
            model, arguments(tmp_path / str(coef), learning_rate=1e-2, max_steps=20)
        )
        trainer.train()
        ends.append(logged(trainer, "busiest_expert")[-1])
        assert bool(logged(trainer, "router_aux_loss")) == bool(coef)
    assert ends[1] < ends[0]


def test_the_weight_is_by_default_what_the_config_asks_for():
    asked = tiny_model("mixtral", output_router_logits=True, router_aux_loss_coef=0.03)
    prepare(asked)
    assert asked.routers.coef == 0.03
    prepare(asked)  # a second time: the config no longer asks
    assert asked.routers.coef == 0.03
    silent = tiny_model("mixtral", router_aux_loss_coef=0.03)
    prepare(silent)
    assert silent.routers.coef == 0
    assert getattr(make_model(), "routers", None) is None


def test_an_evaluation_and_the_reference_have_no_balancing_loss(tmp_path):
    model = tiny_model("mixtral")
    prepare(model, router_aux_loss_coef=COEF)
    trainer = sft_trainer(model, arguments(tmp_path), eval_documents=documents(3, seed=9))
    results = trainer.evaluate()
    model.routers.coef = 0.0
    assert results["eval_loss"] == trainer.evaluate()["eval_loss"]
    assert "eval_router_aux_loss" not in results


@pytest.mark.parametrize("family", ["llama", "deepseek_v3"])
def test_a_model_without_such_a_loss_is_refused(family):
    with pytest.raises(ConfigError, match=r"--router_aux_loss_coef: .*(no experts|no load-bal)"):
        prepare(tiny_model(family), router_aux_loss_coef=COEF)


def test_every_family_with_the_loss_has_its_routers_found():
    assert len(routers_of(tiny_model("mixtral"))) == tiny_model("mixtral").config.num_hidden_layers
    assert balancing_function(tiny_model("qwen3_moe")) is not None
    watch = RouterWatch(tiny_model("deepseek_v3"))
    assert watch.coef == 0
    assert watch.routers
