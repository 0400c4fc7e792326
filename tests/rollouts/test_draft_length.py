"""What guessing costs, counted in forwards and tokens under cost models that are known."""

import random

import pytest

from posttrain.packed.batch import Layout
from posttrain.packed.prepare import prepare
from posttrain.rollouts.draft_length import IDLE, LOSS, Controller, Cost, Step
from posttrain.rollouts.drafts import Draft, Kind
from posttrain.rollouts.generator import HFGenerator, way_to_generate
from posttrain.rollouts.lookahead import Lookahead
from posttrain.rollouts.sampling import Sampling
from tests.conftest import make_model, make_tokenizer, random_ids

# Seconds of a forward of n tokens: mostly fixed, half, none, and a roof line.
COSTS = {
    "memory": lambda n: 10 + n,
    "mixed": lambda n: 1 + n,
    "tokens": lambda n: float(n),
    "roof": lambda n: max(20.0, 2.0 * n),
}
CALLS = 4


class Oracle:
    """A drafter that knows the completions, and says a token rightly with a chance."""

    needs_hidden, most_guesses = False, 8

    def __init__(self, chance):
        self.chance, self.dice = chance, random.Random(0)

    def begin(self, prompts, sampling):
        pass

    def end(self, rows):
        pass

    def propose(self, rows, most, hidden):  # noqa: ARG002
        drafts = []
        for row in rows:
            ids = self.completions[row.number].token_ids[len(row.ids) :][: min(most, row.room - 1)]
            ids = [t if self.dice.random() < self.chance else (t + 1) % 90 for t in ids]
            drafts.append(Draft(ids, [Kind("told", depth) for depth in range(len(ids))]))
        return drafts


@pytest.fixture(scope="module")
def model():
    model = make_model()
    prepare(model)
    way_to_generate(model)
    HFGenerator(model, lookahead=Lookahead("ngram", [Oracle(0)])).generate(
        [[5, 6]], Sampling(1, ()), 1
    )
    return model


def compared(model, cost, chance, num_generations, drafter=None, calls=CALLS):
    """Seconds with guesses over those without, by the cost model, over all calls."""
    now, dice = [0.0], random.Random(1)

    def pay(_model, _arguments, named):
        if not isinstance(named["packed"], Layout):
            now[0] += cost(named["input_ids"].numel())

    prompts = [random_ids(9, dice) for _ in range(3 if num_generations > 1 else 1)]
    sampling = Sampling(32, (1, 2, 3) if num_generations > 1 else ())
    drafter, taken = drafter or Oracle(chance), {"plain": 0.0, "ahead": 0.0}
    drafter.now = now
    lookahead = Lookahead("ngram", [drafter], clock=lambda: now[0])
    hook = model.register_forward_pre_hook(pay, with_kwargs=True)
    try:
        for call in range(calls):
            seeds = [100 * call + row for row in range(len(prompts))]
            ways = {"plain": HFGenerator(model), "ahead": HFGenerator(model, lookahead=lookahead)}
            found = {}
            for name, generator in ways.items():
                begun = now[0]
                found[name] = generator.generate(prompts, sampling, num_generations, seeds=seeds)
                taken[name] += now[0] - begun
                if name == "plain":
                    drafter.completions = [c for siblings in found[name] for c in siblings]
            ids = [[c.token_ids for s in siblings for c in s] for siblings in found.values()]
            assert ids[0] == ids[1]
    finally:
        hook.remove()
    return taken["ahead"] / taken["plain"]


@pytest.mark.parametrize("num_generations", [1, 4])
@pytest.mark.parametrize("cost", COSTS)
def test_guesses_that_are_wrong_cost_at_most_3_percent(model, cost, num_generations):
    for chance in (0.0, 0.5):
        ratio = compared(model, COSTS[cost], chance, num_generations)
        assert ratio <= 1 + LOSS, (cost, chance, ratio)


def test_guesses_that_are_right_pay_where_a_forward_costs_more_than_its_tokens(model):
    assert compared(model, COSTS["memory"], 1.0, 1, calls=10) < 0.6
    assert compared(model, COSTS["roof"], 0.95, 1, calls=10) < 0.6
    assert compared(model, COSTS["memory"], 1.0, 4, calls=10) < 0.95


def test_the_cost_of_a_token_is_found_from_forwards_of_unequal_size():
    cost = Cost()
    for number in (4, 4, 6, 3, 4):
        cost.add(number, 7 + 2 * number)
    assert cost.is_known
    assert (cost.fixed, cost.per_token) == (pytest.approx(7), pytest.approx(2))


def test_equal_forwards_leave_it_open_and_all_counts_as_the_tokens():
    cost = Cost()
    for _ in range(5):
        cost.add(4, 8.0)
    assert not cost.is_known
    assert (cost.fixed, cost.per_token) == (0.0, 2.0)


def test_the_account_by_hand():
    """A plain step of n rows takes 7 + 2 n. One with guesses took 15 s, and 1 s on the host.

    Two rows gained three tokens, so plain decoding would have paid 7 + 2 * 3 = 13, of which 3 % may
    be lost; neither row was left behind, so nothing more is certainly saved.
    """
    controller = Controller()
    for number in (4, 4, 6, 3, 5):
        controller.plain.add(number, 7 + 2 * number)
    controller.begin()
    controller.learn(Step(rows=2, guesses=3, emitted=3, lead=0, seconds=15, other=1))
    assert controller.balance == pytest.approx(LOSS * 13 + 13 - 16)
    before = controller.balance
    controller.learn(Step(rows=2, guesses=2, emitted=4, lead=1, seconds=14, other=0.5))
    needed = 7 * 2 + 2 * 4  # the slowest row has been spared a forward
    assert controller.balance - before == pytest.approx(LOSS * needed + needed - 14.5)


def test_guesses_below_the_break_even_chance_are_not_verified():
    """a = 7, b = 2, one row: a guess pays from a chance of 2 / (2 + 7) = 0.22 on."""
    controller = Controller(balance=1e9)
    for number in (4, 4, 6, 3, 5):
        controller.cost.add(number, 7 + 2 * number)
    likely, unlikely = Kind("told", 0, prior=0.9), Kind("told", 1, prior=0.1)
    drafts = [Draft([5, 6, 7], [likely, likely, unlikely])]
    assert controller.chosen(drafts, 1)[0].token_ids == [5, 6]  # 0.9, 0.81, 0.081
    assert controller.chosen(drafts, 40)[0].token_ids == []  # a row's share of a is too small


def test_guesses_are_tried_behind_those_that_pay():
    """Steps of one guess do not tell what a second costs: here 1/150 of a forward."""
    controller, dice, lead, sizes = Controller(), random.Random(0), 0, []
    kinds = [Kind("told", depth, prior=0.33) for depth in range(8)]
    chances = [0.67, 0.33, *[0.8] * 6]
    controller.rates[kinds[0]] = [134.0, 200.0]
    for _ in range(50):
        controller.earn(40, 40, 40 * 3.0)
        controller.cost.add(2, 3.04)
    controller.begin()
    for _ in range(300):
        (draft,) = controller.chosen([Draft([5] * 8, kinds)], 1)
        size = len(draft.token_ids)
        right = next((i for i in range(size) if dice.random() > chances[i]), size)
        lead += right
        verified = [(kind, i + 1, i < right) for i, kind in enumerate(kinds[: right + 1])]
        controller.learn(
            Step(1, size, right + 1, lead, 3 + 0.02 * (1 + size), 0.5, verified[:size])
        )
        sizes.append(size)
    assert sum(sizes[-100:]) / 100 > 6


def test_a_tree_is_cut_with_its_parents():
    draft = Draft([5, 6, 7, 8], [Kind("told", i) for i in range(4)], [0, 0, 2, 3])
    kept = draft.kept([1, 2])
    assert (kept.token_ids, kept.parents) == ([6, 7], None)  # a chain now
    both = draft.kept([0, 1, 2])
    assert (both.token_ids, both.parents) == ([5, 6, 7], [0, 0, 2])


def test_a_batch_begins_once_its_first_step_and_the_way_back_are_earned():
    """A plain step takes 2 s. One with guesses may last twice as long, the way back half of one."""
    controller = Controller()
    assert not controller.ready(1)
    controller.earn(49, 49, 98.0)  # 3 %: 2.94 s
    assert not controller.ready(1)
    controller.earn(1, 1, 2.0)
    assert controller.ready(1)
    controller.begin()
    assert controller.goes_on(1)
    controller.learn(Step(1, 3, emitted=1, seconds=3.0, other=1.0))
    assert not controller.goes_on(1)  # 2 s were lost
    controller.end()
    assert controller.patience == 2


def test_a_batch_without_guesses_is_handed_back():
    controller = Controller(balance=100.0)
    controller.earn(1, 1, 1.0)
    controller.begin()
    for _ in range(IDLE):
        assert controller.goes_on(1)
        controller.learn(Step(1, 0, emitted=1, seconds=1.0))
    assert not controller.goes_on(1)


class Slow(Oracle):
    """Drafters' time is time too."""

    def propose(self, rows, most, hidden):
        self.now[0] += 4.0
        return super().propose(rows, most, hidden)


@pytest.mark.parametrize("num_generations", [1, 4])
def test_drafters_that_take_twice_as_long_as_forwards_cost_at_most_3_percent(
    model, num_generations
):
    ratio = compared(model, COSTS["mixed"], 0.3, num_generations, Slow(0.3), calls=12)
    assert ratio <= 1 + LOSS, ratio


class Enough(Controller):
    """Hands each batch back after some steps, whatever they gained."""

    def __init__(self, num_steps):
        super().__init__()
        self.num_steps = num_steps

    def ready(self, num_rows):  # noqa: ARG002
        self.left = self.num_steps
        return True

    def goes_on(self, num_rows):  # noqa: ARG002
        self.left -= 1
        return self.left >= 0

    def chosen(self, drafts, num_rows):  # noqa: ARG002
        return list(drafts)


@pytest.mark.parametrize("num_steps", [0, 1, 4])
@pytest.mark.parametrize("family", [("llama", {}), ("mistral", {"sliding_window": 6})])
def test_rows_that_are_handed_back_keep_their_tokens(family, num_steps):
    """At unequal paces, with windows, min_tokens, rows that end before and after, 3 seeds."""
    model, dice = make_model(family[0], **family[1]), random.Random(3)
    prepare(model)
    prompts = [random_ids(size, dice) for size in (9, 4, 12)]
    sampling = Sampling(16, tuple(range(12)), min_tokens=5)
    drafter = Oracle(0.6)
    lookahead = Lookahead("ngram", [drafter], controller=Enough(num_steps))
    for seed in range(3):
        seeds = [10 * seed + row for row in range(3)]
        plain = HFGenerator(model).generate(prompts, sampling, 4, seeds=seeds)
        drafter.completions = [c for siblings in plain for c in siblings]
        generator = HFGenerator(model, lookahead=lookahead)
        ahead = generator.generate(prompts, sampling, 4, seeds=seeds)
        found = [c for siblings in ahead for c in siblings]
        assert len({len(c.token_ids) for c in found}) > 3
        for one, other in zip(drafter.completions, found, strict=True):
            assert one.token_ids == other.token_ids
            assert one.finish_reason == other.finish_reason
            assert one.logps == pytest.approx(other.logps, abs=1e-5)
            assert one.sampler_logps == pytest.approx(other.sampler_logps, abs=1e-5)


@pytest.mark.parametrize("num_steps", [1, 3])
def test_stop_strings_that_cross_the_handover_are_found(model, num_steps):
    prompts, drafter = [random_ids(6, random.Random(row)) for row in range(4)], Oracle(0.5)
    sampling, tokenizer = Sampling(20, (), stop_strings=("4 5", "77")), make_tokenizer()
    lookahead = Lookahead("ngram", [drafter], controller=Enough(num_steps))
    plain = HFGenerator(model, tokenizer=tokenizer).generate(prompts, sampling, 4)
    drafter.completions = [c for siblings in plain for c in siblings]
    assert {c.finish_reason for c in drafter.completions} == {"stop", "length"}
    ahead = HFGenerator(model, tokenizer=tokenizer, lookahead=lookahead)
    found = [c for siblings in ahead.generate(prompts, sampling, 4) for c in siblings]
    for one, other in zip(drafter.completions, found, strict=True):
        assert (one.token_ids, one.finish_reason) == (other.token_ids, other.finish_reason)
