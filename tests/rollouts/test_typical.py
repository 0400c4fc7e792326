"""Medusa's typical acceptance: likely guesses stay, completions differ, and training refuses it."""

import pytest
import torch

from posttrain.commands import generate
from posttrain.errors import ConfigError
from posttrain.packed.batch import pack_groups
from posttrain.packed.forward import packed_logps
from posttrain.packed.prepare import prepare
from posttrain.rollouts.drafts import HeadDrafter, NGramDrafter
from posttrain.rollouts.generator import HFGenerator
from posttrain.rollouts.lookahead import Lookahead
from posttrain.rollouts.options import RolloutOptions, lookahead_of
from posttrain.rollouts.sampling import Sampling
from posttrain.rollouts.trees import PUBLISHED, cut
from posttrain.rollouts.typical import DELTA, EPSILON
from posttrain.run.options import parse
from posttrain.run.settings import RLConfig
from tests.conftest import make_model

VOCABULARY = make_model().config.vocab_size
PROMPTS = [[5, 6, 7, 5, 6], [9, 8, 7]]


class Told:
    """Stand-in heads whose most likely token `depth` places on is the same each time."""

    depth = 3

    def draft_logits(self, hidden, _tokens):
        """Logits that lead from token 20 on."""
        logits = torch.linspace(3, 0, VOCABULARY).roll(20)[None].expand(len(hidden), -1)
        return [logits.roll(depth, -1) for depth in range(self.depth)]


def sharp_model():
    """A tiny model whose distributions have an entropy of about 3 nats."""
    model = make_model()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(40)
    prepare(model)
    return model


def made(*, temperature=1.0, drafter=None, **settings):
    drafter = drafter or HeadDrafter(Told(), cut(PUBLISHED, 3))
    lookahead = Lookahead("heads", [drafter], acceptance="typical")
    sampling = Sampling(12, (), temperature, **settings)
    model = sharp_model()
    found = HFGenerator(model, lookahead=lookahead).generate(PROMPTS, sampling, 3)
    return model, sampling, found, lookahead


def test_kept_tokens_are_typical_or_the_most_likely_ones():
    """By plain forwards of what came out: each token is above the bar, or the argmax."""
    model, _, found, lookahead = made()
    assert lookahead.counts["emitted"] > lookahead.counts["rows"]  # some guesses stayed
    batch = pack_groups(PROMPTS, [[c.token_ids for c in group] for group in found],
                        device="cpu")  # fmt: skip
    with torch.no_grad():
        logps = packed_logps(model, batch).logps
    sampled = [logp for group in found for c in group for logp in c.logps]
    assert sampled == pytest.approx(logps.tolist(), abs=1e-5)
    for prompt, group in zip(PROMPTS, found, strict=True):
        for completion in group:
            ids = torch.tensor([[*prompt, *completion.token_ids]])
            with torch.no_grad():
                probs = model(ids).logits[0, len(prompt) - 1 : -1].softmax(-1)
            own = probs.gather(1, ids[0, len(prompt) :, None])[:, 0]
            bar = (DELTA * torch.special.entr(probs).sum(-1).neg().exp()).clamp(max=EPSILON)
            assert ((own > bar - 1e-6) | (own >= probs.max(-1).values - 1e-6)).all()
            assert own[0] >= probs[0].max() - 1e-6  # the first token is greedy


def test_completions_differ_from_the_models_and_do_not_at_temperature_0():
    model, sampling, found, _ = made()
    plain = HFGenerator(model).generate(PROMPTS, sampling, 3)
    assert [c.token_ids for c in found[0]] != [c.token_ids for c in plain[0]]
    model, sampling, found, _ = made(temperature=0.0)
    plain = HFGenerator(model).generate(PROMPTS, sampling, 3)
    assert [[c.token_ids for c in g] for g in found] == [[c.token_ids for c in g] for g in plain]


def test_guesses_outside_top_k_do_not_stay():
    """With one token left to sample from, what stays is greedy decoding."""
    model, _, found, _ = made(top_k=1, drafter=NGramDrafter())
    greedy = HFGenerator(model).generate(PROMPTS, Sampling(12, (), 0.0), 3)
    assert [[c.token_ids for c in g] for g in found] == [[c.token_ids for c in g] for g in greedy]


def test_training_and_plain_decoding_refuse_it_before_anything_is_loaded(capsys):
    lookahead = lookahead_of("ngram", lambda: None, "typical")
    with pytest.raises(ConfigError, match="acceptance: expected exact, found typical"):
        RolloutOptions(lookahead=lookahead)
    for name in ("none", "auto"):
        with pytest.raises(ConfigError, match="expected --lookahead heads or ngram"):
            lookahead_of(name, lambda: pytest.fail("looked"), "typical")
    with pytest.raises(SystemExit):
        parse(RLConfig, ["--acceptance", "typical"])
    assert "--acceptance: unknown flag. It is one of `posttrain gen" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        generate.main(["nowhere", "--prompt", "5", "--acceptance", "typical"])
    assert "expected --lookahead heads or ngram" in capsys.readouterr().err
