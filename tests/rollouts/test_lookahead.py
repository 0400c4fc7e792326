"""With guesses completions are those of plain decoding, token for token, and so is what learns."""

import random

import pytest
import torch

from benchmarks.families import tiny_model
from posttrain.errors import ConfigError
from posttrain.packed.ahead import Ahead
from posttrain.packed.forward import Step
from posttrain.packed.prepare import prepare
from posttrain.rollouts.ahead_decoding import AheadDecoding
from posttrain.rollouts.draft_length import Unlimited
from posttrain.rollouts.drafts import Draft, HeadDrafter, Kind, NGramDrafter
from posttrain.rollouts.generator import HFGenerator, way_to_generate
from posttrain.rollouts.lookahead import Lookahead
from posttrain.rollouts.options import RolloutOptions, lookahead_of
from posttrain.rollouts.sampling import Sampling, Stretch, sample_tokens
from posttrain.rollouts.trees import PUBLISHED
from tests.conftest import make_model, make_tokenizer, random_ids
from tests.rollouts.test_generator_lora import adapted
from tests.trainers import tiny

FAMILIES = ("llama", "gemma2", "gpt_oss")  # gemma2: windows and caps, gpt_oss: windows, sinks, MoE
STOPS = tuple(range(2, 22))  # of 300 tokens: completions of all lengths


@pytest.fixture(scope="module", params=FAMILIES)
def model(request):
    model = tiny_model(request.param)
    prepare(model)
    assert way_to_generate(model) == "loop"
    return model


def guessing(*drafters):
    """Lookahead that verifies every guess."""
    return Lookahead("ngram", drafters or [NGramDrafter()], controller=Unlimited())


def flat(completions):
    return [completion for siblings in completions for completion in siblings]


def assert_same(found, expected, tolerance=1e-5):
    """The same tokens, ends and, to the tolerance, log-probs."""
    for ours, plain in zip(flat(found), flat(expected), strict=True):
        assert (ours.token_ids, ours.finish_reason) == (plain.token_ids, plain.finish_reason)
        assert ours.logps == pytest.approx(plain.logps, abs=tolerance)
        assert ours.sampler_logps == pytest.approx(plain.sampler_logps, abs=tolerance)


def prompts_of(count, dice):
    """Prompts of 3 to 29 tokens out of 25, in which runs of tokens come again."""
    return [[dice.randrange(2, 27) for _ in range(dice.randrange(3, 30))] for _ in range(count)]


class Noisy:
    """Stand-in heads: right logits of the tokens ahead, by plain decoding, with noise."""

    depth = 4

    def __init__(self, model, noise):
        self.model, self.noise = model, noise
        self.generator = torch.Generator().manual_seed(0)

    def draft_logits(self, hidden, tokens):
        rows = [[*row.prompt, *row.ids] for row in self.rows]
        assert [ids[-1] for ids in rows] == tokens.tolist()
        head, last = self.model.get_output_embeddings(), []
        for ids, state in zip(rows, hidden, strict=True):  # the states that chose the tokens
            logits = self.model(torch.tensor([ids])).logits[0]
            assert head(state[None]).argmax() == logits[-2].argmax()
            last.append(logits[-1])
        logits = torch.stack(last)
        shape = (self.depth, *logits.shape)
        return list(logits + self.noise * torch.randn(shape, generator=self.generator))


class NoisyDrafter(HeadDrafter):
    """Shows the rows to its stand-in heads."""

    def propose(self, rows, most, hidden):
        self.heads.rows = rows
        return super().propose(rows, most, hidden)


@pytest.mark.parametrize("seed", range(4))
def test_ngrams_change_no_token(model, seed):
    """Groups of four that end at different times, and a second pass over them."""
    restricted = [{}, {"temperature": 0.0}, {"temperature": 0.9, "top_p": 0.9}, {"top_k": 9}]
    sampling = Sampling(20, STOPS, min_tokens=seed, **restricted[seed])
    prompts, seeds = prompts_of(2, random.Random(seed)), [seed, seed + 100]
    plain = HFGenerator(model).generate(prompts, sampling, 4, seeds=seeds)
    lookahead = guessing()
    for _ in range(2):
        ahead = HFGenerator(model, lookahead=lookahead)
        assert_same(ahead.generate(prompts, sampling, 4, seeds=seeds), plain)
    counts = lookahead.counts
    assert counts["emitted"] > 1.5 * counts["rows"]  # the second pass is known
    assert counts["guesses"] >= counts["right_1"] > 0


@pytest.mark.parametrize("count", [1, 5, 32])
def test_batches_of_any_size_stay_as_they_are(count):
    model = make_model(num_hidden_layers=2)
    prepare(model)
    prompts = [random_ids(3 + row % 7, random.Random(row)) for row in range(count)]
    sampling = Sampling(24, tuple(range(1, 5)))
    plain = HFGenerator(model).generate(prompts, sampling, 1)
    lookahead = guessing()
    for _ in range(2):
        found = HFGenerator(model, lookahead=lookahead, rows_at_once=24).generate(prompts, sampling)
        assert_same(found, plain)
    assert lookahead.counts["right_1"] > 0


def test_a_wrong_token_would_be_seen(model, monkeypatch):
    """Negative control: a decode loop that believes its guesses gives other completions."""

    def believe(_self, draft, own, _offset, _step):
        return list(range(len(draft.token_ids) + 1)), own

    prompts, sampling = prompts_of(3, random.Random(0)), Sampling(20, STOPS)
    plain = HFGenerator(model).generate(prompts, sampling, 4)
    lookahead = guessing(Wrong())
    assert_same(HFGenerator(model, lookahead=lookahead).generate(prompts, sampling, 4), plain)
    monkeypatch.setattr(AheadDecoding, "_accepted", believe)
    with pytest.raises(AssertionError):
        assert_same(HFGenerator(model, lookahead=lookahead).generate(prompts, sampling, 4), plain)


class Wrong:
    """Guesses token 9, again and again."""

    needs_hidden, most_guesses = False, 3

    def begin(self, prompts, sampling):
        pass

    def end(self, rows):
        pass

    def propose(self, rows, most, hidden):  # noqa: ARG002
        sizes = [min(3, row.room - 1) for row in rows]
        return [Draft([9] * size, [Kind("told", 0)] * size) for size in sizes]


@pytest.mark.parametrize("tree", [None, PUBLISHED], ids=["chain", "tree"])
def test_heads_change_no_token_in_a_chain_or_a_tree(model, tree):
    """Their first level is right nearly always: the noise is small, and the number the same."""
    prompts, sampling = prompts_of(3, random.Random(1)), Sampling(12, STOPS, 0.8, top_k=20)
    plain = HFGenerator(model).generate(prompts, sampling, 2)
    lookahead = guessing(NoisyDrafter(Noisy(model, 0.05), tree))
    found = HFGenerator(model, lookahead=lookahead).generate(prompts, sampling, 2)
    assert_same(found, plain)
    counts = lookahead.counts
    assert counts["right_1"] > 0.8 * counts["verified_1"] / (10 if tree else 1)
    assert counts["emitted"] > 1.6 * counts["rows"]


def test_the_same_number_makes_guesses_match_where_likely_tokens_do_not():
    """Two even distributions over 50 tokens, slightly different: inverted at one number they agree,
    and the most likely tokens of the two do not."""
    generator = torch.Generator().manual_seed(0)
    logits = 0.01 * torch.randn(200, 50, generator=generator)
    other = logits + 0.01 * torch.randn(200, 50, generator=generator)
    uniform = torch.rand(200, generator=generator)
    same = sample_tokens(logits.log_softmax(-1), uniform)
    assert (same == sample_tokens(other.log_softmax(-1), uniform)).float().mean() > 0.9
    assert (same == other.argmax(-1)).float().mean() < 0.1


def test_lora_and_stop_strings_and_a_completion_that_goes_on():
    base = make_model()
    prepare(base)
    model = adapted(base)
    prompts = [random_ids(6, random.Random(row)) for row in range(4)]
    sampling = Sampling(20, (), stop_strings=("4 5", "77"))
    tokenizer, lookahead = make_tokenizer(), guessing()
    plain = HFGenerator(model, tokenizer=tokenizer).generate(prompts, sampling, 2)
    assert {c.finish_reason for c in flat(plain)} == {"stop", "length"}
    for _ in range(2):
        ahead = HFGenerator(model, tokenizer=tokenizer, lookahead=lookahead)
        assert_same(ahead.generate(prompts, sampling, 2), plain)
    # The second half of the first completion, from its own random numbers.
    whole = HFGenerator(model).generate(prompts[:1], Sampling(20, ()), 2, seeds=[0])
    start = [*prompts[0], *whole[0][0].token_ids[:8]]
    part = Stretch(0, 2, 20, start=8, answer=0)
    rest = HFGenerator(model, lookahead=lookahead).generate(
        [start], Sampling(12, ()), 1, seeds=[part]
    )
    assert rest[0][0].token_ids == whole[0][0].token_ids[8:]


def test_no_padded_token_is_computed_and_none_feeds_one_a_row():
    """Each forward has as many tokens as rows and guesses; `none` feeds one token a row."""
    model, fed = make_model(num_hidden_layers=2), []
    prepare(model)
    way_to_generate(model)
    prompts, sampling = [random_ids(6, random.Random(row)) for row in range(4)], Sampling(16, (1,))
    lookahead = guessing()
    HFGenerator(model, lookahead=lookahead).generate(prompts, sampling, 2)
    lookahead.counts.clear()

    def look(_model, _arguments, named):
        fed.append((type(named["packed"]).__name__, named["input_ids"].numel()))

    model.register_forward_pre_hook(look, with_kwargs=True)
    HFGenerator(model, lookahead=lookahead).generate(prompts, sampling, 2)
    counts = lookahead.counts
    ahead = [tokens for kind, tokens in fed if kind == "Ahead"]
    assert (len(ahead), sum(ahead)) == (counts["steps"], counts["rows"] + counts["guesses"])
    fed.clear()
    HFGenerator(model).generate(prompts, sampling, 2)
    assert {kind for kind, _ in fed[1:]} == {Step.__name__}


def test_what_is_remembered_is_bounded_and_counted():
    drafter = NGramDrafter(most_entries=600)
    model = make_model()
    prepare(model)
    for seed in range(6):
        prompts = [random_ids(10, random.Random(10 * seed + row)) for row in range(3)]
        HFGenerator(model, lookahead=guessing(drafter)).generate(prompts, Sampling(16, ()), 2)
        sizes = sum(known.size for known in drafter.known.values())
        assert drafter.num_entries == sizes <= 600
    assert 0 < len(drafter.known) < 18  # the oldest prompts were forgotten


def test_a_model_with_a_cache_of_its_own_is_refused_or_by_auto_decoded_plainly(
    capsys,
):
    model = tiny_model("mamba")
    prepare(model)
    sampling = Sampling(4, ())
    with pytest.raises(
        ConfigError, match="--lookahead ngram: expected a model that the decode loop"
    ):
        HFGenerator(model, lookahead=guessing()).generate([[5, 6]], sampling)
    auto = Lookahead("auto", [NGramDrafter()])
    plain = HFGenerator(model).generate([[5, 6]], sampling)
    capsys.readouterr()
    for _ in range(2):
        assert_same(HFGenerator(model, lookahead=auto).generate([[5, 6]], sampling), plain)
    assert capsys.readouterr().out.count("lookahead none") == 1


def test_settings_that_cannot_work_are_refused_before_anything_is_generated():
    assert lookahead_of("none", find_heads=lambda: pytest.fail("looked")) is None
    with pytest.raises(ConfigError, match="--lookahead heads: expected heads beside the model"):
        lookahead_of("heads", lambda: None)
    ngram = lookahead_of("ngram", lambda: None)
    with pytest.raises(ConfigError, match="vLLM has its own setting"):
        RolloutOptions(lookahead=ngram, engine=print)
    with pytest.raises(ConfigError, match="experts of guessed tokens"):
        RolloutOptions(lookahead=ngram, replay_routing=True)
    auto = lookahead_of("auto", lambda: None)
    assert RolloutOptions(lookahead=auto, engine=print).lookahead is auto


def test_a_model_whose_guesses_would_change_log_probs_is_found_by_trying(monkeypatch):
    """Negative control of the probe: attention that shows guesses to each other."""
    plain = Ahead.of

    def leaking(*arguments):
        ahead = plain(*arguments)
        ahead.seen = torch.ones_like(ahead.seen)
        return ahead

    model = make_model()
    prepare(model)
    monkeypatch.setattr(Ahead, "of", staticmethod(leaking))
    with pytest.raises(ConfigError, match="log-probs with guesses differ by"):
        HFGenerator(model, lookahead=guessing()).generate([[5, 6]], Sampling(4, ()))


def test_rl_with_guesses_gives_the_same_weights(tmp_path):
    """Five steps of GRPO whose prompts come again: the same weights to 1e-6, with metrics."""
    states, lines = [], []
    for lookahead in (None, Lookahead("ngram", [NGramDrafter()], controller=Unlimited())):
        args = tiny.arguments(tmp_path, max_steps=5)
        trainer = tiny.rl_trainer(make_model(), args, lookahead=lookahead,
                                  prompts=tiny.prompts(tiny.PROMPTS_PER_STEP))  # fmt: skip
        trainer.train()
        states.append(trainer.model.state_dict())
        lines.append([line for line in trainer.state.log_history if "reward" in line])
    for name, weight in states[0].items():
        assert (weight - states[1][name]).abs().max() <= 1e-6, name
    assert "lookahead_tokens_per_step" not in lines[0][-1]
    assert lines[1][-1]["lookahead_tokens_per_step"] > 1
    assert 0 <= lines[1][-1]["lookahead_accepted_1"] <= 1
    assert 0 <= lines[1][-1]["lookahead_token_cost"] <= 1


def test_under_autocast_guesses_are_verified_over_a_float32_cache():
    """In bfloat16 the cache of a CPU stays float32; half precision rounds by the batch's shape."""
    model, sampling = make_model(), Sampling(12, STOPS)
    prepare(model)
    prompts, ahead = prompts_of(3, random.Random(0)), guessing()
    with torch.autocast("cpu", torch.bfloat16):
        plain = HFGenerator(model).generate(prompts, sampling, 2)
        for _ in range(2):  # the second time all is known
            found = HFGenerator(model, lookahead=ahead).generate(prompts, sampling, 2)
    assert ahead.counts["emitted"] > ahead.counts["rows"]
    for ours, theirs in zip(flat(found), flat(plain), strict=True):
        pairs = zip(ours.token_ids, theirs.token_ids, strict=False)
        same = next((i for i, (a, b) in enumerate(pairs) if a != b), len(ours.logps))
        assert same
        assert ours.logps[:same] == pytest.approx(theirs.logps[:same], abs=0.1)
