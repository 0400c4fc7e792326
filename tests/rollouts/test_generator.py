"""The decode loop gives what `model.generate` gives, whatever else is in the batch."""

import random

import pytest
import torch

from posttrain.errors import ConfigError
from posttrain.packed.batch import pack_groups
from posttrain.packed.forward import packed_logps
from posttrain.packed.prepare import prepare
from posttrain.rollouts import generator
from posttrain.rollouts.generator import HFGenerator, way_to_generate
from posttrain.rollouts.sampling import Sampling
from tests.conftest import make_model, make_tokenizer, random_ids
from tests.fakes.device import FakeCuda
from tests.packed.test_half import CountCasts
from tests.rollouts.greedy import MAX_TOKENS, STOP_IDS, generate_alone, prompts


def prepared(family="llama", *, num_hidden_layers=2, **settings):
    model = make_model(family, num_hidden_layers=num_hidden_layers, **settings)
    prepare(model)
    assert way_to_generate(model) == "loop"  # tried once, here
    return model


def test_rounding_by_autocast_does_not_take_the_decode_loop_away():
    """One log-prob of large logits is off by more than 0.1 nats in bfloat16, whatever generates."""
    model = make_model(num_hidden_layers=4)
    prepare(model)
    with torch.no_grad():
        model.lm_head.weight *= 7
    with torch.autocast("cpu", torch.bfloat16):
        assert way_to_generate(model) == "loop"


@pytest.mark.parametrize(
    "model",
    [("llama", {}), ("qwen3", {"tie_word_embeddings": True}), ("gemma", {})],
    ids=["llama-gqa", "qwen3", "gemma"],
)
def test_greedy_completions_equal_those_of_generate(model):
    """64 of 64 prompts of 1 to 39 tokens, each run alone by transformers on its own attention."""
    family, settings = model
    expected = generate_alone(make_model(family, num_hidden_layers=2, **settings))
    sampling = Sampling(MAX_TOKENS, STOP_IDS, temperature=0.0)
    completions = HFGenerator(prepared(family, **settings)).generate(prompts(), sampling)
    assert [siblings[0].token_ids for siblings in completions] == expected
    lengths = {len(ids) for ids in expected}
    assert len(lengths) > 3  # stopped early and late
    assert MAX_TOKENS in lengths


def test_a_completion_ends_with_its_stop_token_or_is_cut_and_says_which():
    sampling = Sampling(MAX_TOKENS, STOP_IDS)
    completions = HFGenerator(prepared()).generate(prompts(), sampling)
    reasons = set()
    for (completion,) in completions:
        reasons.add(completion.finish_reason)
        assert not set(completion.token_ids[:-1]) & set(STOP_IDS)
        assert (completion.token_ids[-1] in STOP_IDS) == (completion.finish_reason == "stop")
        assert completion.finish_reason == "stop" or len(completion.token_ids) == MAX_TOKENS
        assert len(completion.logps) == len(completion.token_ids)
    assert reasons == {"stop", "length"}


def test_without_stop_tokens_every_completion_is_cut():
    completions = HFGenerator(prepared()).generate(prompts(3), Sampling(5, ()))
    assert [len(completion.token_ids) for (completion,) in completions] == [5, 5, 5]


def test_a_completion_does_not_depend_on_the_batch_it_is_sampled_in():
    """All prompts at once, in another order and one by one: the same tokens from the same seeds."""
    ours, sampling = HFGenerator(prepared()), Sampling(MAX_TOKENS, STOP_IDS)
    texts, seeds = prompts(12), list(range(100, 112))
    together = ours.generate(texts, sampling, 3, seeds=seeds)
    backwards = ours.generate(texts[::-1], sampling, 3, seeds=seeds[::-1])[::-1]
    alone = [
        ours.generate([t], sampling, 3, seeds=[s])[0] for t, s in zip(texts, seeds, strict=True)
    ]
    for other in (backwards, alone):
        for siblings, others in zip(together, other, strict=True):
            assert [a.token_ids for a in siblings] == [a.token_ids for a in others]
    reseeded = ours.generate(texts, sampling, 3, seeds=[s + 1 for s in seeds])
    assert [a.token_ids for s in reseeded for a in s] != [a.token_ids for s in together for a in s]


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_log_probs_of_sampled_tokens_equal_the_training_forwards(temperature):
    model = prepared()
    texts = prompts(16)
    completions = HFGenerator(model).generate(texts, Sampling(MAX_TOKENS, STOP_IDS, temperature), 4)
    ids = [[completion.token_ids for completion in siblings] for siblings in completions]
    batch = pack_groups(texts, ids, device="cpu")
    trained = packed_logps(model, batch, temperature=temperature).logps
    sampled = torch.tensor([x for s in completions for completion in s for x in completion.logps])
    assert (trained - sampled).abs().max() < 1e-4
    other = packed_logps(model, batch, temperature=temperature + 0.1).logps
    assert (other - sampled).abs().max() > 1e-2  # a temperature of one side only would be seen


def test_tokens_are_sampled_from_the_restricted_distribution_and_both_log_probs_are_kept():
    """With top-k 2 the two probabilities that were sampled from add up to 1."""
    model, texts = prepared(), prompts(16)
    sampling = Sampling(MAX_TOKENS, STOP_IDS, 0.8, top_k=2)
    completions = HFGenerator(model).generate(texts, sampling, 4)
    ids = [[completion.token_ids for completion in siblings] for siblings in completions]
    batch = pack_groups(texts, ids, device="cpu")
    trained = packed_logps(model, batch, temperature=0.8).logps
    flat = [completion for siblings in completions for completion in siblings]
    own = torch.tensor([x for completion in flat for x in completion.logps])
    sampler = torch.tensor([x for completion in flat for x in completion.sampler_logps])
    assert (trained - own).abs().max() < 1e-4
    assert (sampler > own).all()
    first = {}  # of each prompt: token -> probability, of the first token of its completions
    for row, siblings in enumerate(completions):
        for completion in siblings:
            first.setdefault(row, {})[completion.token_ids[0]] = completion.sampler_logps[0]
    pairs = [torch.tensor(list(p.values())).exp().sum() for p in first.values() if len(p) == 2]
    assert len(pairs) > 3
    assert torch.allclose(torch.stack(pairs), torch.ones(len(pairs)), atol=1e-5)
    plain = HFGenerator(model).generate(texts, Sampling(MAX_TOKENS, STOP_IDS, 0.8), 4)
    assert all(
        completion.sampler_logps == completion.logps
        for siblings in plain
        for completion in siblings
    )


def test_no_completion_stops_before_min_tokens():
    sampling = Sampling(MAX_TOKENS, STOP_IDS, min_tokens=5)
    lengths = [len(a.token_ids) for (a,) in HFGenerator(prepared()).generate(prompts(), sampling)]
    assert min(lengths) == 6  # five others, then a stop token at the earliest
    free = Sampling(MAX_TOKENS, STOP_IDS)
    assert min(len(a.token_ids) for (a,) in HFGenerator(prepared()).generate(prompts(), free)) < 5


def test_a_completion_ends_where_a_stop_string_is_complete():
    """The string spans two tokens: a 4, then any token from 50 to 59."""
    strings, sampling = ("4 5",), Sampling(60, (), stop_strings=("4 5",))
    ours = HFGenerator(prepared(), tokenizer=make_tokenizer())
    tokenizer, ends = make_tokenizer(), 0
    for (completion,) in ours.generate(prompts(), sampling):
        text = tokenizer.decode(completion.token_ids)
        before = tokenizer.decode(completion.token_ids[:-1])
        assert strings[0] not in before
        assert (strings[0] in text) == (completion.finish_reason == "stop")
        ends += completion.finish_reason == "stop"
    assert 3 < ends < len(prompts())


def test_stop_strings_without_a_tokenizer_are_an_error():
    with pytest.raises(ConfigError, match="need HFGenerator"):
        HFGenerator(prepared()).generate(prompts(1), Sampling(4, (), stop_strings=("x",)))


def test_finished_rows_leave_the_batch_and_prompts_are_computed_once():
    model, shapes = prepared(), []
    model.register_forward_pre_hook(
        lambda _, __, inputs: shapes.append(tuple(inputs["input_ids"].shape)), with_kwargs=True
    )
    texts = prompts(16)
    completions = HFGenerator(model).generate(texts, Sampling(40, STOP_IDS), 4)
    (_, prefill), *steps = shapes
    assert prefill == sum(map(len, texts))  # packed, and not once for each completion
    rows = [count for count, _ in steps]
    lengths = [len(completion.token_ids) for siblings in completions for completion in siblings]
    assert rows[0] <= 64
    assert rows == sorted(rows, reverse=True)
    assert rows[-1] < 8
    assert len(steps) == max(lengths) - 1
    # Few rows are computed in vain: at most one in ten of those alive.
    assert sum(rows) <= 1.12 * sum(length - 1 for length in lengths) + len(steps)


def test_generating_leaves_the_model_in_its_mode_and_without_gradients():
    model = prepared()
    model.activation_checkpointing_enable()
    sampling = Sampling(MAX_TOKENS, STOP_IDS)
    expected = HFGenerator(prepared()).generate(prompts(4), sampling)
    for training in (True, False):
        model.train(training)
        assert HFGenerator(model).generate(prompts(4), sampling) == expected
        assert model.training is training
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(30, STOP_IDS, 0.8),
        Sampling(30, STOP_IDS, 0.8, top_k=20, top_p=0.9, min_tokens=3),
        Sampling(30, STOP_IDS, 0.0),
        Sampling(30, (3,), stop_strings=("4 5", "9")),
    ],
)
def test_on_a_gpu_rows_leave_later_and_completions_are_the_same(sampling):
    """Token for token, log-prob for log-prob: what a row samples after its end is thrown away."""
    texts, tokenizer = prompts(16), make_tokenizer()
    wanted = HFGenerator(prepared(), tokenizer=tokenizer).generate(texts, sampling, 4)
    with FakeCuda() as cuda:
        model = prepared().to(cuda.device)
        found = HFGenerator(model, tokenizer=tokenizer).generate(texts, sampling, 4)
    for siblings, others in zip(found, wanted, strict=True):
        for one, other in zip(siblings, others, strict=True):
            assert one.token_ids == other.token_ids
            assert one.finish_reason == other.finish_reason
            assert one.logps == pytest.approx(other.logps, abs=1e-5)
            assert one.sampler_logps == pytest.approx(other.sampler_logps, abs=1e-5)
    reasons = {c.finish_reason for siblings in wanted for c in siblings}
    assert reasons == {"stop", "length"} or not sampling.temperature or len(reasons) == 1


def waits(max_tokens, **settings):
    """Waits and uploads of the decode loop on a GPU for completions that never end."""
    with FakeCuda() as cuda:
        model = prepared().to(cuda.device)
        uploads = len(cuda.uploads)
        HFGenerator(model, **settings).generate(prompts(4), Sampling(max_tokens, ()), 2)
    assert all(event.pinned for event in cuda.uploads[uploads:])
    return len(cuda.syncs), len(cuda.uploads) - uploads


def test_a_gpu_is_waited_for_once_in_eight_tokens():
    assert waits(8) == (2, 5)  # the results; the last token needs no look
    assert waits(40) == (2 + 4, 5)


@pytest.mark.parametrize("rows", [1, 3, 7, 8, 64])
def test_the_cache_is_bounded_in_bytes(rows, monkeypatch):
    """A slot of a row is 2 layers x (key, value) x 2 heads x 8 numbers x 4 bytes = 256 bytes."""
    texts, sampling = [random_ids(20, random.Random(i)) for i in range(5)], Sampling(10, STOP_IDS)
    wanted = HFGenerator(prepared()).generate(texts, sampling, 4)
    sizes, spread, bounded = [], generator.Cache.spread, prepared()

    def watched(cache, index, num_slots):
        spread(cache, index, num_slots)
        sizes.append(sum(state.nbytes for state in (*cache.keys, *cache.values)))

    monkeypatch.setattr(generator.Cache, "spread", watched)
    limit = 256 * 30 * rows + 100
    found = HFGenerator(bounded, cache_bytes=limit).generate(texts, sampling, 4)
    assert max(sizes) <= limit
    assert len(sizes) == {1: 20, 3: 10, 7: 5, 8: 3, 64: 1}[rows]  # whole prompts where they fit
    assert [[c.token_ids for c in s] for s in found] == [[c.token_ids for c in s] for s in wanted]


def test_under_autocast_weights_are_cast_once_for_all_tokens():
    model = prepared()
    matrices = sum("proj" in name or "head" in name for name, _ in model.named_parameters())
    forward = model.forward

    def in_half(*args, **kwargs):  # as accelerate wraps it
        with torch.autocast("cpu", torch.bfloat16):
            return forward(*args, **kwargs)

    model.forward = in_half
    with CountCasts() as casts:
        HFGenerator(model).generate(prompts(4), Sampling(12, ()))
    assert casts.count == matrices
