"""Prediction modules draft: completions stay, and guesses are those of modules that see it all."""

import random

import pytest
import torch

from posttrain.errors import ConfigError
from posttrain.heads import Heads, MTPModules, ParallelHeads, add_heads, load_heads, save_heads
from posttrain.packed.prepare import prepare
from posttrain.rollouts.draft_length import Unlimited
from posttrain.rollouts.generator import HFGenerator
from posttrain.rollouts.lookahead import Lookahead
from posttrain.rollouts.sampling import Sampling
from posttrain.rollouts.step_drafter import StepDrafter
from tests.conftest import make_model, random_ids
from tests.heads.common import stir
from tests.rollouts.test_lookahead import assert_same

DEPTH = 3
PROMPTS = [random_ids(5 + row, random.Random(row)) for row in range(3)]


class Watched(StepDrafter):
    """Compares each guess's logits with modules run anew over the whole text, without a cache."""

    gap, compared = 0.0, 0

    def _chosen(self, logits, rows, depth):
        chosen = super()._chosen(logits, rows, depth)
        self.guessed = [[] for _ in rows] if depth == 0 else self.guessed
        for row, mine, guesses, token in zip(rows, logits, self.guessed, chosen, strict=True):
            ids = [*row.prompt, *row.ids, *guesses]
            length = len(ids) - 1 - depth
            (states,) = self.heads.prompt_states([ids[:length]])
            hidden, positions = states[None], torch.arange(length)[None]
            for k in range(1, depth + 2):
                tokens = torch.tensor([ids[k : k + length]])
                hidden, expected = self.heads.step(hidden, tokens, positions, depth=k)
            self.gap = max(self.gap, float((expected[0] - mine).abs().max()))
            self.compared += 1
            guesses.append(token)
        return chosen


@pytest.fixture(scope="module")
def heads():
    model = make_model(num_hidden_layers=2)
    prepare(model)
    return Heads(model, stir(MTPModules.on(model, num_modules=DEPTH)).requires_grad_(False))


def test_modules_change_no_token_and_see_the_whole_text(heads):
    """Groups of prompts of 1 to 9 tokens, whose rows end at different times."""
    prompts = [random_ids(length, random.Random(length)) for length in (1, 9, 4)]
    sampling = Sampling(14, tuple(range(1, 9)), 0.8)
    plain = HFGenerator(heads.model).generate(prompts, sampling, 3)
    drafter = Watched(heads)
    lookahead = Lookahead("heads", [drafter], controller=Unlimited())
    found = HFGenerator(heads.model, lookahead=lookahead).generate(prompts, sampling, 3)
    assert_same(found, plain)
    assert drafter.compared > 30
    assert drafter.gap < 1e-4
    assert lookahead.counts["guesses"] > lookahead.counts["rows"]


def test_modules_that_draft_few_tokens_change_no_token_and_have_the_logits_of_those(tmp_path):
    model = make_model(num_hidden_layers=2)
    prepare(model)
    module = stir(MTPModules.on(model, num_modules=2))
    all_tokens = Heads(model, module.requires_grad_(False))
    hidden, tokens = torch.randn(3, 1, 32), torch.tensor([[5], [6], [7]])
    positions = torch.zeros(3, 1, dtype=torch.long)
    _, expected = all_tokens.step(hidden, tokens, positions)
    plain = HFGenerator(model).generate(PROMPTS, Sampling(20, (2, 3)), 2)
    module.draft_tokens_of([int(token % 3 == 0) for token in range(expected.shape[1])])
    add_heads(model, module)
    save_heads(model, tmp_path)
    few = load_heads(tmp_path, model)
    assert few.drafted_ids == list(range(0, expected.shape[1], 3))
    with torch.no_grad():
        torch.testing.assert_close(few.step(hidden, tokens, positions)[1], expected[:, ::3])
        model.get_output_embeddings().weight.mul_(1.5)  # an optimizer's step
        changed = few.step(hidden, tokens, positions)[1]
        torch.testing.assert_close(changed, 1.5 * expected[:, ::3])
        model.get_output_embeddings().weight.div_(1.5)
    lookahead = Lookahead("heads", [StepDrafter(few)], controller=Unlimited())
    found = HFGenerator(model, lookahead=lookahead).generate(PROMPTS, Sampling(20, (2, 3)), 2)
    assert_same(found, plain)
    assert lookahead.counts["verified_1"] > 0


def test_right_guesses_are_accepted():
    """New modules are the last layer once more: next to a model that repeats itself they agree."""
    model = make_model(num_hidden_layers=2)
    prepare(model)
    with torch.no_grad():  # every place predicts the same distribution
        model.get_output_embeddings().weight.zero_()
    same = Heads(model, MTPModules.on(model, num_modules=DEPTH))
    lookahead = Lookahead("heads", [], heads=lambda _: same, controller=Unlimited())
    sampling = Sampling(16, ())
    found = HFGenerator(model, lookahead=lookahead).generate([[5, 6, 7]], sampling, 2)
    assert_same(found, HFGenerator(model).generate([[5, 6, 7]], sampling, 2))
    assert lookahead.counts["emitted"] == 2 * 15
    assert lookahead.counts["steps"] == -(-15 // (DEPTH + 1))


def test_parallel_heads_are_refused():
    model = make_model(num_hidden_layers=2)
    prepare(model)
    parallel = Heads(model, ParallelHeads.on(model, num_heads=2))
    lookahead = Lookahead("heads", [], heads=lambda _: parallel)
    with pytest.raises(ConfigError, match="found parallel, by which the decode loop cannot draft"):
        HFGenerator(model, lookahead=lookahead).generate([[5, 6]], Sampling(4, ()))
