"""Families of models: what packing serves, what runs by rows, and what is refused with a reason."""

import itertools
import random
from contextlib import nullcontext

import pytest
import torch

from benchmarks import models as census
from benchmarks.families import tiny_model
from posttrain.errors import ConfigError
from posttrain.packed import prepare as making_ready
from posttrain.packed.batch import Segment, pack, pack_groups
from posttrain.packed.forward import check_context, computes_rows, heads_of, packed_logps
from posttrain.packed.kernels import Rules, sdpa
from posttrain.packed.prepare import prepare
from posttrain.packed.scalar import add_critic, scores_and_values
from posttrain.rollouts.generator import HFGenerator, way_to_generate
from posttrain.rollouts.sampling import Sampling
from tests.conftest import make_model, random_ids
from tests.trainers.tiny import arguments, dpo_trainer, logged, rl_trainer, sft_trainer

# One of each thing that a family may have: windows, sinks, caps, scales, chunks, MLA, experts …
PACKED = ["mistral", "gemma2", "gemma3_text", "gemma4_text", "gpt_oss", "llama4_text", "cohere2",
          "deepseek_v3", "qwen3_moe", "gpt2", "granitemoe, logits / 8", "mixtral, router logits",
          "qwen2 with a window"]  # fmt: skip
# … linear attention, convolutions, state spaces, and attention of its own: rows in a packed model …
MIXED = ["qwen3_5_text", "qwen3_next", "lfm2_moe", "granitemoehybrid", "nemotron_h", "nemotron"]
# … and ALiBi, state spaces alone, a sparse indexer, a decoder of an encoder-decoder.
# The last two change their logits in a module of their own, or by a setting of another name.
ROWS = ["bloom", "mamba", "deepseek_v32", "bart", "inkling2_text", "recurrent_gemma"]


@pytest.mark.parametrize("name", PACKED + MIXED + ROWS)
def test_a_family_is_exact_in_scores_gradients_and_generation_beyond_its_window(name):
    """Against the untouched model, sequences of up to 48 tokens, windows and chunks of 16."""
    verdict = census.judge(name)
    assert verdict.how == ("rows" if name in ROWS else "packed"), verdict
    assert (verdict.generation == "loop") == (name in PACKED)  # which a fault would lose it


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("bert as an encoder", "is not causal"),
        ("doge", "is not causal"),
        ("prophetnet", "is not causal"),
    ],
)
def test_what_nothing_serves_is_refused_with_the_reason(name, reason):
    verdict = census.judge(name)
    assert verdict.how == "refused"
    assert reason in verdict.reason


def test_a_probe_reaches_beyond_every_window():
    """Within it, a kernel that ignored windows would look right."""
    model = make_model("mistral", sliding_window=40)
    prompt, completions = making_ready.probe_ids(model)
    assert len(prompt) > 40
    assert all(len(prompt) + len(ids) < 256 for ids in completions)


def test_a_window_that_the_attention_is_not_told_of_is_noticed():
    """Phi-3.5 MoE masks by its window, and does not pass it on to the attention function."""
    assert census.judge("phimoe with a window").how == "rows"


@pytest.mark.parametrize("rules", [
    Rules(window=5), Rules(chunk=6), Rules(cap=0.7), Rules(window=3, cap=0.7),
    Rules(sinks=torch.tensor([0.3, -1.0, 2.0, 0.0])), Rules(window=4, sinks=torch.zeros(4)),
])  # fmt: skip
def test_attention_by_its_rules_is_that_of_the_formula(rules):
    """A prompt, two answers and a document, token by token from the definition, in float64."""
    segments = [Segment(range(9)), Segment(range(4), 0), Segment(range(11), 0), Segment(range(7))]
    layout = pack(segments, num_rows=0, device="cpu").layout
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(31, h, 8, dtype=torch.float64, generator=draw) for h in (4, 2, 2))
    found = sdpa(q, k, v, layout=layout, scale=0.4, rules=rules)
    for index in range(len(segments)):
        keys = torch.cat([torch.arange(*r) for r in layout.key_ranges(index)])
        for offset in range(layout.lengths[index]):
            position, place = layout.depths[index] + offset, layout.starts[index] + offset
            seen = [
                p for p in range(position + 1)
                if (not rules.window or p > position - rules.window)
                and (not rules.chunk or p // rules.chunk == position // rules.chunk)
            ]  # fmt: skip
            for head in range(4):
                scores = k[keys[seen], head // 2] @ q[place, head] * 0.4
                scores = rules.cap * torch.tanh(scores / rules.cap) if rules.cap else scores
                extra = [] if rules.sinks is None else [rules.sinks[head].double()[None]]
                shares = torch.cat([scores, *extra]).softmax(-1)[: len(seen)]
                torch.testing.assert_close(found[place, head], shares @ v[keys[seen], head // 2])


def test_a_padded_query_without_a_key_in_reach_makes_no_nan():
    """A short answer beside a long one, in a window of one token."""
    layout = pack([Segment(range(3)), Segment(range(2), 0), Segment(range(9), 0)], num_rows=0,
                  device="cpu").layout  # fmt: skip
    states = [torch.randn(14, 2, 4, requires_grad=True) for _ in range(3)]
    sdpa(*states, layout=layout, scale=1.0, rules=Rules(window=1)).sum().backward()
    assert all(state.grad.isfinite().all() for state in states)


TRAINERS = {"sft": sft_trainer, "dpo": dpo_trainer, "rl": rl_trainer}


@pytest.mark.parametrize("kind", TRAINERS)
def test_by_rows_a_trainer_takes_the_steps_that_it_takes_packed(kind, tmp_path):
    """A LLaMA, which packing serves too: losses and gradient norms to rounding."""
    runs = []
    for way in ("auto", "rows"):
        model = make_model()
        prepare(model, attn_implementation=way)
        assert computes_rows(model) == (way == "rows")
        trainer = TRAINERS[kind](model, arguments(tmp_path / way, per_device_train_batch_size=8))
        trainer.train()
        runs.append([logged(trainer, name) for name in ("loss", "grad_norm")])
        if kind != "rl":  # whose log line of a rollout has other numbers of the same name
            assert len(runs[-1][0]) == 3
    for packed, rows in zip(*runs, strict=True):
        assert rows == pytest.approx(packed, rel=1e-4, abs=2e-6)


@pytest.mark.parametrize("padded", [True, False])
def test_rows_give_the_gradient_of_a_shared_prompt_once_for_each_completion(padded):
    model, plain = make_model(), make_model()
    prepare(model, attn_implementation="rows")
    model.rows_padded = padded
    prompt, answers = [5, 6, 7], [[8, 9, 10, 11], [12]]
    packed_logps(model, pack_groups([prompt], [answers], device="cpu")).logps.sum().backward()
    for answer in answers:
        logits = plain(torch.tensor([prompt + answer])).logits[0, 2:-1].log_softmax(-1)
        logits.gather(-1, torch.tensor(answer)[:, None]).sum().backward()
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("way", ["loop", "cache", "no cache"])
def test_every_way_to_generate_draws_the_same_completions(way):
    """The random numbers belong to prompt and seed, not to the way; stops and lengths too."""
    model = make_model(num_hidden_layers=2)
    prepare(model)
    assert way_to_generate(model) == "loop"
    draw = random.Random(0)
    prompts = [random_ids(n, draw) for n in (4, 9, 4)]
    sampling = Sampling(12, (1, 2, 3, 4, 5, 6), temperature=0.9, top_k=20, min_tokens=2)
    wanted = HFGenerator(model).generate(prompts, sampling, 3, seeds=[5, 6, 7])
    model.generates_by = way
    found = HFGenerator(model).generate(prompts, sampling, 3, seeds=[5, 6, 7])
    assert {c.finish_reason for siblings in wanted for c in siblings} == {"stop", "length"}
    for one, other in zip(*map(itertools.chain.from_iterable, (found, wanted)), strict=True):
        assert (one.token_ids, one.finish_reason) == (other.token_ids, other.finish_reason)
        assert one.logps == pytest.approx(other.logps, abs=1e-4)
        assert one.sampler_logps == pytest.approx(other.sampler_logps, abs=1e-4)


def test_a_model_that_generation_cannot_serve_says_so(monkeypatch):
    from posttrain.rollouts import generator

    model = make_model()
    prepare(model)
    monkeypatch.setattr(generator, "_agrees", lambda *_: False)
    with pytest.raises(ConfigError, match="can be trained but not sampled from"):
        way_to_generate(model)


def test_generation_beyond_the_models_positions_is_refused_wherever_it_comes_from():
    model = make_model(max_position_embeddings=32)
    prepare(model)
    with pytest.raises(ConfigError, match="has 32 positions"):
        HFGenerator(model).generate([[5] * 20], Sampling(13, ()))


def test_positions_of_a_composite_model_are_read_from_its_text_part():
    model = tiny_model("gemma3")
    with pytest.raises(ConfigError, match="has 256 positions"):
        check_context(model, 257, "Lower it.")


@pytest.mark.parametrize("family", ["gpt2", "bloom", "falcon", "big_bird", "seed_oss"])
def test_no_dropout_is_left_in_training(family):
    """In layers of their own, in layers made by the first forward, and in numbers of the config."""
    every = ("hidden_dropout", "activation_dropout", "attention_dropout", "resid_pdrop")
    model = tiny_model(family, **dict.fromkeys(every, 0.3))
    prepare(model)
    batch = pack_groups([[5, 6, 7]], [[[8, 9, 10], [11, 12]]], device="cpu")
    with torch.no_grad():
        wanted = packed_logps(model.eval(), batch).logps
        assert torch.equal(packed_logps(model.train(), batch).logps, wanted)


def test_left_padding_makes_no_nan_where_scores_are_capped():
    """A query of padding sees no key at all."""
    model, plain = tiny_model("gemma2"), tiny_model("gemma2")
    prepare(model)
    ids, mask = torch.tensor([[0, 0, 5, 6, 7]]), torch.tensor([[0, 0, 1, 1, 1]])
    found, wanted = (m(ids, attention_mask=mask).logits[:, 2:] for m in (model, plain))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama4_text", "minicpm3", "roberta", "mamba"])
def test_a_critic_leaves_the_scores_as_they_are(family):
    """Also where the head gets something else than the trunk's last states."""
    model = tiny_model(family)
    prepare(model)
    batch = pack_groups([[5, 6, 7]], [[[8, 9, 10], [11, 12]]], device="cpu")
    wanted = packed_logps(model, batch).logps
    add_critic(model, None)
    scores, values = scores_and_values(model, batch)
    assert torch.equal(scores.logps, wanted)
    assert values.shape == wanted.shape


def test_a_model_below_an_adapter_is_the_one_that_is_made_ready():
    """An adapter passes on reads of the model's settings, and keeps writes to itself."""
    from peft import LoraConfig, get_peft_model

    model, plain = tiny_model("cohere"), tiny_model("cohere")
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
    assert prepare(adapted) == "sdpa"
    for answers in ([[8, 9]], [[8, 9], [10, 11]]):
        found = packed_logps(adapted, pack_groups([[5, 6]], [answers], device="cpu")).logps
        logits = [plain(torch.tensor([[5, 6, *ids]])).logits[0, 1:-1] for ids in answers]
        wanted = torch.cat(logits).log_softmax(-1)[
            range(len(found)), [i for ids in answers for i in ids]
        ]
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["qwen3", "gemma3_text", "gpt_oss", "bloom"])
def test_weights_in_half_precision_are_no_reason_to_refuse(family):
    model = tiny_model(family).to(torch.bfloat16)
    assert prepare(model) == ("rows" if family == "bloom" else "sdpa")
    assert way_to_generate(model) == ("cache" if family == "bloom" else "loop")


@pytest.mark.parametrize("positions", [10, 12, 16, 17])
def test_a_model_of_few_positions_is_probed_within_them(positions):
    assert prepare(make_model(max_position_embeddings=positions)) == "sdpa"


def test_a_model_with_fewer_positions_than_a_probe_is_refused():
    with pytest.raises(ConfigError, match="expected at least 10 positions"):
        prepare(make_model(max_position_embeddings=9))


def test_no_prompts_give_no_completions():
    model = make_model()
    prepare(model, attn_implementation="rows")
    assert HFGenerator(model).generate([], Sampling(3, (1,))) == []


def test_rows_can_be_undone():
    model = make_model()
    assert prepare(model, attn_implementation="rows") == "rows"
    assert prepare(model) == "sdpa"
    assert not computes_rows(model)


def test_the_settings_of_generation_are_back_after_it_also_below_an_adapter():
    from peft import LoraConfig, get_peft_model

    base = tiny_model("bloom")
    base.generation_config.repetition_penalty = 1.3
    prepare(base)
    model = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear")).train()
    HFGenerator(model).generate([[5, 6, 7]], Sampling(3, (1,)))
    assert base.generation_config.repetition_penalty == 1.3
    assert model.generation_config.repetition_penalty == 1.3
    assert model.training


@pytest.mark.parametrize("family", ["rwkv", "roberta"])
def test_a_cache_that_gives_other_numbers_than_training_is_not_used(family):
    """Their own generation draws from another distribution than a forward of the whole sequence."""
    model = tiny_model(family)
    assert prepare(model) == "rows"
    assert way_to_generate(model) == "no cache"


@pytest.mark.parametrize(("family", "is_refused"), [("llama", False), ("minicpm3", True)])
def test_under_fsdp_a_critic_needs_a_head_on_the_trunks_last_states(
    family, is_refused, monkeypatch
):
    """There the states are read from the trunk, for a head may be called but once."""
    model = tiny_model(family)
    prepare(model)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ConfigError, match="PPO under FSDP") if is_refused else nullcontext():
        add_critic(model, None)


def test_the_heads_of_mla_are_those_of_its_queries():
    """The config's head_dim is that of the rotary part alone."""
    model = tiny_model("deepseek_v3")
    config = model.config
    assert config.head_dim == config.qk_rope_head_dim
    width = config.qk_nope_head_dim + config.qk_rope_head_dim
    assert heads_of(model)["head_dim"] == width == model.model.layers[0].self_attn.qk_head_dim
