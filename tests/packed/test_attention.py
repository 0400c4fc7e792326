"""The packed, prefix-shared forward is exact: the first test of everything else."""

import random
import sys
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from posttrain.errors import ConfigError
from posttrain.packed import prepare as making_ready
from posttrain.packed.batch import pack_documents, pack_groups
from posttrain.packed.cuda_kernels import KERNELS, _varlen_plan, check_kernel
from posttrain.packed.forward import packed_logps
from posttrain.packed.kernels import Rules, dense_attention
from posttrain.packed.prepare import choose_kernel, prepare
from tests.conftest import TINY, make_model, random_ids
from tests.fakes.device import FakeCuda

FAMILIES = ["llama", "qwen2", "qwen3", "mistral", "gemma"]
TOLERANCE = 1e-5  # relative, float32


def groups(seed: int = 0):
    """Prompts of different lengths with one to five answers, from one token to dozens."""
    draw = random.Random(seed)
    prompts = [random_ids(n, draw) for n in (3, 17, 40)]
    lengths = [(5,), (1, 9, 33), (12, 2, 2, 27, 8)]
    return prompts, [[random_ids(n, draw) for n in siblings] for siblings in lengths]


def alone(model, prompt, answer):
    """Log-probs of an answer from an ordinary forward of its sequence, by the full logits."""
    logits = model(torch.tensor([prompt + answer]), use_cache=False).logits[0]
    log_probs = logits[len(prompt) - 1 : -1].log_softmax(-1)
    return log_probs.gather(-1, torch.tensor(answer)[:, None]).squeeze(-1)


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def relative(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_log_probs_and_gradients_equal_each_sequence_run_alone(family):
    model = make_model(family, num_hidden_layers=2)
    prepare(model)
    prompts, answers = groups()
    batch = pack_groups(prompts, answers, device="cpu")
    packed = packed_logps(model, batch).logps
    pairs = [(p, a) for p, siblings in zip(prompts, answers, strict=True) for a in siblings]
    single = torch.cat([alone(model, p, a) for p, a in pairs])
    assert relative(packed, single) < TOLERANCE
    weights = torch.randn(len(single), generator=torch.Generator().manual_seed(1))
    expected = gradients(model, (single * weights).sum())
    assert relative(gradients(model, (packed * weights).sum()), expected) < TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
def test_documents_that_leak_into_each_other_would_be_noticed(family):
    """The negative control: one segment made of two documents, positions kept."""
    model = make_model(family, num_hidden_layers=2)
    prepare(model)
    draw = random.Random(2)
    documents = [
        {"input_ids": random_ids(n, draw), "trained": [False] + [True] * (n - 1)} for n in (8, 11)
    ]
    batch = pack_documents(documents, device="cpu")
    leaking = replace(batch.layout, starts=[0], lengths=[19], parents=[-1], depths=[0], plans={})
    exact = packed_logps(model, batch).logps
    leaked = packed_logps(model, replace(batch, layout=leaking)).logps
    assert relative(leaked[:7], exact[:7]) < TOLERANCE  # the first document sees nothing new
    assert relative(leaked[7:], exact[7:]) > 100 * TOLERANCE


def test_gradient_checkpointing_changes_nothing():
    model = make_model()
    prepare(model)
    batch = pack_groups(*groups(), device="cpu")
    expected = gradients(model, packed_logps(model, batch).logps.sum())
    model.activation_checkpointing_enable()
    model.train()
    assert model.is_activation_checkpointing
    assert torch.equal(gradients(model, packed_logps(model, batch).logps.sum()), expected)


def test_generate_still_works_on_a_prepared_model():
    model = make_model()
    prompt = torch.tensor([random_ids(9, random.Random(3))])
    settings = {"do_sample": False, "max_new_tokens": 12, "attention_mask": torch.ones_like(prompt)}
    before = model.generate(prompt, **settings)
    prepare(model)
    assert torch.equal(model.generate(prompt, **settings), before)


def test_attention_that_ignores_the_layout_runs_by_rows(monkeypatch, capsys):
    """The stock path would leak from one completion into the next without a word."""
    model = make_model()
    stock = partial(model.set_attn_implementation, "sdpa")
    monkeypatch.setattr(model, "set_attn_implementation", lambda _ours: stock())
    prepare(model)
    assert "1 layers run by rows, all else packed: LlamaAttention" in capsys.readouterr().out


def test_a_kernel_that_cannot_be_had_is_an_error_that_names_the_choices():
    cpu = torch.device("cpu")
    assert choose_kernel("auto", device=cpu, dtype=torch.float32) == "sdpa"
    with pytest.raises(ConfigError, match=r"needs a CUDA device.*Usable here: auto, sdpa"):
        choose_kernel("varlen", device=cpu, dtype=torch.bfloat16)
    with pytest.raises(ConfigError, match="needs bfloat16 or float16"):
        choose_kernel("flash_attention_2", device=torch.device("cuda"), dtype=torch.float32)


def varlen_by_hand(query, key, value, cu_queries, cu_keys, max_queries, max_keys, **settings):
    """What torch's varlen_attn is documented to compute, one sequence at a time."""
    before, after = settings["window_size"]
    assert after == 0  # causal, aligned at the bottom right
    assert settings["enable_gqa"] == (query.shape[1] != key.shape[1])
    assert cu_queries.dtype == cu_keys.dtype == torch.int32
    outputs = []
    for i in range(len(cu_queries) - 1):
        q = query[cu_queries[i] : cu_queries[i + 1]].transpose(0, 1)
        k, v = (x[cu_keys[i] : cu_keys[i + 1]].transpose(0, 1) for x in (key, value))
        assert q.shape[1] <= max_queries
        assert k.shape[1] <= max_keys
        mask = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool)
        mask = mask.tril(offset := k.shape[1] - q.shape[1])
        if before >= 0:
            mask = mask.triu(offset - before)
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, scale=settings["scale"], enable_gqa=settings["enable_gqa"]
        )
        outputs.append(out.transpose(0, 1))
    return torch.cat(outputs)


@pytest.mark.parametrize("window", [None, 1, 11])
@pytest.mark.parametrize("kernel", ["varlen", "flash_attention_2"])
def test_the_index_tensors_of_the_cuda_kernels_give_what_sdpa_gives(kernel, window, monkeypatch):
    """The kernels run on CUDA alone; what they are called with is checked against a stand-in."""

    def flash(*arguments, softmax_scale, causal, window_size, softcap):
        assert causal
        assert softcap == 0
        query, key = arguments[:2]
        grouped = query.shape[1] != key.shape[1]
        return varlen_by_hand(
            *arguments, scale=softmax_scale, window_size=window_size, enable_gqa=grouped
        )

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_by_hand)
    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(flash_attn_varlen_func=flash))
    layout = pack_groups(*groups(), device="cpu").layout
    draw = torch.Generator().manual_seed(5)
    num_tokens = sum(layout.lengths)
    query, key, value = (torch.randn(num_tokens, h, 8, generator=draw) for h in (4, 2, 2))
    settings = {"layout": layout, "scale": 0.3, "rules": Rules(window=window)}
    found = KERNELS[kernel](query, key, value, **settings)
    wanted = KERNELS["sdpa"](query, key, value, **settings)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def without_backward(query, key, value, **settings):
    """SDPA's outputs, and no gradient of the values: a kernel whose forward alone is right."""
    return KERNELS["sdpa"](query, key, value.detach(), **settings)


def of_small_heads_only(query, key, value, **settings):
    """A kernel as FlashAttention is, which raises for heads larger than it was built for."""
    if query.shape[-1] > 256:
        raise RuntimeError("head dimension at most 256")
    return KERNELS["sdpa"](query, key, value, **settings)


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        (lambda query, _key, _value, **_: query, "its outputs differ from SDPA's"),
        (without_backward, "its gradients of v differ from SDPA's"),
        (of_small_heads_only, "it fails with 2 heads of size 512: head dimension at most 256"),
    ],
)
def test_a_kernel_that_computes_something_else_is_refused(monkeypatch, kernel, message):
    check_kernel("sdpa", device=torch.device("cpu"))
    monkeypatch.setitem(KERNELS, "varlen", kernel)
    with pytest.raises(ConfigError, match=message):
        check_kernel(
            "varlen", device=torch.device("cpu"), num_heads=2, num_kv_heads=1, head_dim=512
        )


def test_a_kernel_is_tried_with_the_models_own_heads(monkeypatch):
    tried = {}
    monkeypatch.setattr(making_ready, "choose_kernel", lambda *_, **__: "varlen")
    monkeypatch.setattr(making_ready, "check_kernel", lambda _name, **heads: tried.update(heads))
    prepare(make_model(num_attention_heads=8, num_key_value_heads=4, head_dim=4))
    assert (tried["num_heads"], tried["num_kv_heads"], tried["head_dim"]) == (8, 4, 4)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_attention_dropout_is_switched_off_with_a_word(family, capsys):
    model = make_model(family, attention_dropout=0.1)
    prepare(model)
    assert "dropout of the model's config is off" in capsys.readouterr().out
    assert all(layer.self_attn.attention_dropout == 0 for layer in model.model.layers)


def test_attention_dropout_that_is_set_later_is_refused_in_training():
    model = make_model()
    prepare(model)
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.1
    batch = pack_groups([[5, 6]], [[[7]]], device="cpu")
    packed_logps(model, batch)  # there is none in evaluation
    with pytest.raises(ConfigError, match="applies attention dropout"):
        packed_logps(model.train(), batch)


def test_decoding_with_grouped_heads_reads_the_cache_as_it_lies(monkeypatch):
    """Repeated for its 4 query heads a key head would be copied with every token."""
    calls, plain = [], torch.nn.functional.scaled_dot_product_attention

    def watched(query, key, value, **settings):
        calls.append((key, value))
        return plain(query, key, value, **settings)

    generator = torch.Generator().manual_seed(6)
    query, key, value = (
        torch.randn(3, heads, n, 8, generator=generator) for heads, n in ((8, 1), (2, 9), (2, 9))
    )
    mask = (torch.arange(9) >= torch.tensor([0, 2, 5])[:, None])[:, None, None]
    wanted = plain(query, key, value, attn_mask=mask, scale=0.3, enable_gqa=True)
    with FakeCuda() as cuda:
        inputs = [x.to(cuda.device) for x in (query, key, value, mask)]
        monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
        found = dense_attention(*inputs, scale=0.3).cpu()
    torch.testing.assert_close(found, wanted)
    assert calls[0][0].data_ptr() == inputs[1].data_ptr()
    assert calls[0][1].data_ptr() == inputs[2].data_ptr()


def test_the_index_tensors_of_a_plan_are_one_copy():
    layouts = [pack_groups(*groups(), device=torch.device("cpu")).layout for _ in range(2)]
    query, key, value = (torch.randn(sum(layouts[0].lengths), h, 8) for h in (4, 2, 2))
    with FakeCuda() as cuda:
        inputs = [x.to(cuda.device) for x in (query, key, value)]
        before = len(cuda.uploads)
        layout = replace(layouts[0], device=cuda.device)
        for _layer in range(3):
            KERNELS["sdpa"](*inputs, layout=layout, scale=0.3)
        assert len(cuda.uploads) == before + 1
        _varlen_plan(replace(layouts[1], device=cuda.device))
        assert len(cuda.uploads) == before + 2
    assert cuda.syncs == []


def test_a_models_own_scale_of_its_attention_scores_is_kept():
    """Granite's multiplier, three times the usual 1 / sqrt(head size)."""
    model = make_model("granite", attention_multiplier=3 * TINY["head_dim"] ** -0.5)
    prepare(model)
    prompts, answers = groups()
    packed = packed_logps(model, pack_groups(prompts, answers, device="cpu")).logps
    pairs = [(p, a) for p, siblings in zip(prompts, answers, strict=True) for a in siblings]
    single = torch.cat([alone(model, p, a) for p, a in pairs])
    assert relative(packed, single) < TOLERANCE
    usual = make_model("granite", attention_multiplier=TINY["head_dim"] ** -0.5)
    assert relative(torch.cat([alone(usual, p, a) for p, a in pairs]), single) > 100 * TOLERANCE
