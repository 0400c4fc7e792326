"""Routing replay: training takes the experts of the rollout, with weights of its own routers."""

import copy
from pathlib import Path

import pytest
import torch

from benchmarks import families
from posttrain.errors import ConfigError
from posttrain.losses import tis_weights
from posttrain.packed.batch import with_experts
from posttrain.packed.forward import packed_logps
from posttrain.packed.half import hold_in_half
from posttrain.packed.prepare import prepare
from posttrain.packed.replay import RoutingReplay
from posttrain.rollouts.generator import HFGenerator, way_to_generate
from posttrain.rollouts.group import Group, pack
from posttrain.rollouts.own_cache import OwnCacheGenerator
from posttrain.rollouts.routing import RoutingRecorder
from posttrain.rollouts.sampling import Sampling
from posttrain.run.options import parse
from recipes import grpo
from tests.conftest import make_model
from tests.trainers.tiny import arguments, logged, rl_trainer

PROMPTS = [[5, 6, 7, 8], [9, 10, 11]]
SAMPLING = Sampling(8, stop_ids=tuple(range(2, 12)))


# A router's weights of experts that it is told, from its logits: the formulas of the families.
def of_softmax(router, logits, chosen):
    picked = logits.float().softmax(-1).gather(-1, chosen)
    return picked / picked.sum(-1, keepdim=True) if getattr(router, "norm_topk_prob", 1) else picked


def of_top_logits(_router, logits, chosen):
    return logits.gather(-1, chosen).softmax(-1)


def of_sigmoids(router, logits, chosen):
    picked = logits.sigmoid().gather(-1, chosen)
    return picked / picked.sum(-1, keepdim=True) * router.routed_scaling_factor


FORMULAS = {
    "mixtral": of_softmax,
    "qwen3_moe": of_softmax,
    "gpt_oss": of_top_logits,
    "granitemoe": of_top_logits,
    "deepseek_v3, top-k of all": of_sigmoids,
    "qwen3_next": of_softmax,  # generates by its own cache
}


def sampled(model, **settings):
    """The groups of PROMPTS, three completions each, with the experts of their tokens."""
    generator = HFGenerator(model, record_routing=True, **settings)
    found = generator.generate(PROMPTS, SAMPLING, 3, seeds=[1, 2])
    pairs = zip(PROMPTS, found, strict=True)
    return [Group({"prompt_ids": ids}, siblings, torch.zeros(3)) for ids, siblings in pairs]


def tiny_model(name):
    family, changes = families.VARIANTS.get(name, (name, {}))
    return families.tiny_model(family, **changes)


def ready(family):
    model = tiny_model(family)
    prepare(model)
    way_to_generate(model)
    return model.eval()


@torch.no_grad()
def disturb(replay, *models):
    """Change all routers, in each model alike."""
    names = [n for n, m in models[0].named_modules() if any(m is r for r in replay.routers)]
    for model in models:
        draw = torch.Generator().manual_seed(7)
        for weight in [w for name in names for w in model.get_submodule(name).parameters()]:
            weight += 0.5 * weight.std() * torch.randn(weight.shape, generator=draw)
    return names


@pytest.mark.parametrize("family", FORMULAS)
def test_training_takes_the_recorded_experts_with_the_weights_of_its_own_logits(family):
    """Against transformers' model on whole sequences, whose routers are told the experts."""
    model = ready(family)
    plain = tiny_model(family).eval()
    replay, groups = RoutingReplay(model), sampled(model)
    names = disturb(replay, model, plain)
    forced = {}

    def force(name):
        def hook(router, _inputs, output):
            logits, weights, indices = output[0], output[1], output[2]
            k = indices.shape[-1]
            end = replay.starts[names.index(name)] + k + (family.startswith("deepseek"))
            given = forced["rows"][:, end - k : end].long()
            chosen = torch.where(given < 0, indices, given)
            assert torch.equal(weights, FORMULAS[family](router, logits, indices))  # as it came
            return logits, FORMULAS[family](router, logits, chosen), chosen

        return hook

    for name in names:
        plain.get_submodule(name).register_forward_hook(force(name))
    wanted = []
    with torch.no_grad():
        for group in groups:
            for completion in group.completions:
                forced["rows"] = torch.cat((completion.prompt_experts, completion.experts))
                ids = torch.tensor([group.prompt["prompt_ids"] + completion.token_ids])
                length = len(completion.token_ids)
                logps = plain(ids, use_cache=False).logits[0, -length - 1 : -1].log_softmax(-1)
                wanted.append(logps.gather(-1, ids[0, -length:, None]).squeeze(-1))
        batch = pack(groups, device="cpu")
        found = packed_logps(model, batch).logps
        changed, number = replay.changed()
        own = packed_logps(model, with_experts(batch, None)).logps
    torch.testing.assert_close(found, torch.cat(wanted), rtol=1e-5, atol=1e-5)
    assert 0 < changed < number
    assert (found - own).abs().max() > 1e-2  # the control: its own experts are others


@pytest.mark.parametrize("family", FORMULAS)
def test_the_same_weights_choose_what_is_replayed(family):
    model = ready(family)
    replay, groups = RoutingReplay(model), sampled(model)
    batch = pack(groups, device="cpu")
    with torch.no_grad():
        found = packed_logps(model, batch).logps
        changed, number = replay.changed()
        own = packed_logps(model, with_experts(batch, None)).logps
    assert changed == 0
    fed = sum(len(c.token_ids) - 1 for g in groups for c in g.completions)
    assert number == (fed + sum(map(len, PROMPTS))) * batch.layout.experts.shape[1]
    torch.testing.assert_close(found, own, rtol=0, atol=1e-6)
    logps = [torch.tensor(c.logps) for g in groups for c in g.completions]
    torch.testing.assert_close(found, torch.cat(logps), rtol=0, atol=1e-4)


def test_every_way_to_generate_records_the_same_experts():
    model = ready("qwen3_moe")
    expected = sampled(model)
    found = [sampled(model, rows_at_once=2)]  # a prompt's completions in two parts
    for use_cache in (True, False):
        with RoutingRecorder(model) as record:
            own = OwnCacheGenerator(model, None, 4, use_cache=use_cache, record=record)
            lists = own.generate(PROMPTS, SAMPLING, 3, [1, 2])
        found.append([Group({}, siblings, torch.zeros(3)) for siblings in lists])
    for groups in found:
        for group, other in zip(groups, expected, strict=True):
            for mine, theirs in zip(group.completions, other.completions, strict=True):
                assert mine.token_ids == theirs.token_ids
                assert torch.equal(mine.experts.short(), theirs.experts)
                assert torch.equal(mine.prompt_experts.short(), theirs.prompt_experts)


def test_choices_that_training_does_not_make_are_an_error():
    model = ready("qwen3_moe")
    replay = RoutingReplay(model)
    batch = pack(sampled(model), device="cpu")
    for experts in (batch.layout.experts[:-1], batch.layout.experts.repeat(1, 2)):
        with torch.no_grad():
            packed_logps(model, with_experts(batch, experts))
        with pytest.raises(RuntimeError, match="recorded choices of experts were replayed"):
            replay.changed()


def stale(folder, *, checkpointing=False, replayed=True, **settings):
    """A trainer whose routers change between the rollout and the step."""
    model = ready("qwen3_moe")
    args = arguments(folder, activation_checkpointing=checkpointing, max_steps=1)
    trainer = rl_trainer(model, args, replay_routing=replayed, **settings)
    groups = trainer.rollouts.groups

    def then_disturbed(number):
        found = groups(number)
        disturb(RoutingReplay(model) if trainer.replay is None else trainer.replay, model)
        return found

    trainer.rollouts.groups = then_disturbed
    return trainer


def test_a_step_replays_also_inside_activation_checkpoints_and_trains_the_routers(tmp_path):
    seen = []
    for checkpointing in (False, True):
        trainer = stale(tmp_path, checkpointing=checkpointing)
        before = copy.deepcopy(trainer.model.state_dict())
        trainer.train()
        gate = "model.layers.0.mlp.gate.weight"
        moved = (trainer.model.state_dict()[gate] - before[gate]).abs().max()
        assert moved > 0.1  # by the disturbance; what the step did is compared below
        names = ("loss", "grad_norm", "replayed_choices")
        seen.append([logged(trainer, name) for name in names] + [trainer.model.state_dict()[gate]])
    (plain, again) = seen
    assert plain[:3] == [pytest.approx(x, rel=1e-4) for x in again[:3]]
    torch.testing.assert_close(plain[3], again[3], rtol=1e-4, atol=1e-6)
    assert 0.01 < plain[2][0] < 0.9


def test_gradients_are_those_of_the_replayed_forward(tmp_path):
    """A micro-batch of one group at a time gives the routers the gradient of all together."""
    found = []
    for limit in (16384, 30):
        trainer = stale(tmp_path, max_tokens_per_microbatch=limit)
        trainer.train()
        found += logged(trainer, "grad_norm")
    assert found[0] == pytest.approx(found[1], rel=1e-3)
    model = ready("qwen3_moe")
    replay, groups = RoutingReplay(model), sampled(model)
    disturb(replay, model)
    packed_logps(model, pack(groups, device="cpu")).logps.sum().backward()
    assert all(router.weight.grad.abs().max() > 0 for router in replay.routers)


def test_the_ratio_starts_nearer_to_1_than_without(tmp_path):
    gaps = {}
    for replayed in (True, False):
        trainer = stale(tmp_path, replayed=replayed, correction=tis_weights, overlap=True)
        trainer.train()
        gaps[replayed] = logged(trainer, "log_rho_p99")[0] - logged(trainer, "log_rho_p1")[0]
    assert gaps[True] < gaps[False]


def test_neither_the_reference_nor_an_evaluation_replays(tmp_path):
    model = ready("qwen3_moe")
    trainer = rl_trainer(model, arguments(tmp_path), replay_routing=True, beta=0.1)
    groups = sampled(model)
    batch = pack(groups, device="cpu")
    disturb(trainer.replay, model, trainer.reference)
    with torch.no_grad():
        found = trainer.reference_logps(batch)
        assert torch.equal(found, trainer.policy_logps(with_experts(batch, None)))
        assert not torch.allclose(found, trainer.policy_logps(batch), atol=1e-3)


def test_with_lora_the_policy_replays_and_the_reference_does_not(tmp_path):
    from peft import LoraConfig, get_peft_model

    model = ready("qwen3_moe")
    model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    trainer = rl_trainer(model, arguments(tmp_path), replay_routing=True, beta=0.1)
    groups = sampled(model)
    batch = pack(groups, device="cpu")
    disturb(trainer.replay, model)
    with torch.no_grad():
        policy, reference = trainer.policy_logps(batch), trainer.reference_logps(batch)
    assert not torch.allclose(
        policy, reference, atol=1e-3
    )  # the adapter is new, and changes nothing
    trainer.train()
    assert logged(trainer, "replayed_choices")


def test_with_lora_on_weights_in_half_precision_it_starts(tmp_path):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(ready("qwen3_moe"), LoraConfig(r=2, target_modules=["q_proj"]))
    hold_in_half(model, torch.bfloat16)
    trainer = rl_trainer(model, arguments(tmp_path, bf16=True), replay_routing=True)
    trainer.train()
    assert logged(trainer, "replayed_choices")


@pytest.mark.parametrize(
    ("family", "how", "reason"),
    [
        ("llama", "auto", "the model has no routers: leave --replay_routing out"),
        ("qwen3_moe", "rows", "Qwen3MoeForCausalLM is computed by rows"),
        ("phimoe", "auto", "PhimoeTopKRouter of PhimoeForCausalLM does not choose by torch.topk"),
        ("dbrx", "auto", "DbrxRouter of DbrxForCausalLM does not choose by torch.topk"),
    ],
)
def test_what_cannot_be_replayed_is_refused_before_a_rollout(family, how, reason, tmp_path):
    model = make_model() if family == "llama" else tiny_model(family)
    prepare(model, attn_implementation=how)
    with pytest.raises(ConfigError, match=f"--replay_routing: {reason}"):
        rl_trainer(model, arguments(tmp_path), replay_routing=True)


def test_an_engine_is_refused(tmp_path, capsys):
    with pytest.raises(ConfigError, match="replay_routing: expected the decode loop"):
        rl_trainer(make_model(), arguments(tmp_path), replay_routing=True, engine=lambda *_: None,
                   correction=tis_weights)  # fmt: skip
    with pytest.raises(SystemExit):
        parse(grpo.Config, ["--replay_routing", "--rollout", "vllm"])
    assert "replay_routing: expected --rollout hf, found vllm" in capsys.readouterr().err


def test_a_resumed_run_replays_the_rollout_that_was_generated_ahead(tmp_path):
    """What is saved of it, and read again, has the experts."""
    model = ready("qwen3_moe")
    settings = {"replay_routing": True, "overlap": True, "correction": tis_weights}
    trainer = rl_trainer(model, arguments(tmp_path), **settings)
    trainer.rollouts.start(9)
    try:
        ahead = trainer.rollouts.prefetcher
        ahead(0)
        ahead.save(Path(tmp_path))
        (expected,) = ahead._started[1].result()
        ahead.load(Path(tmp_path))
        (found,) = ahead._started[1].result()
    finally:
        trainer.rollouts.close()
    for mine, theirs in zip(found.flat, expected.flat, strict=True):
        assert torch.equal(mine.experts, theirs.experts)
        assert torch.equal(mine.prompt_experts, theirs.prompt_experts)
