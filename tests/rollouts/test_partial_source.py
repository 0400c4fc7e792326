"""The source of partial rollouts on scripted completions: what trains when, in which update, on
which rank."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch

from posttrain.errors import DataError
from posttrain.rewards.call import Scores
from posttrain.rollouts import group as credit
from posttrain.rollouts import partial_source
from posttrain.rollouts.group import Rollout, success_rates
from posttrain.rollouts.options import SEED_STRIDE
from posttrain.rollouts.partial import Parts
from posttrain.rollouts.partial_source import PartialOptions, PartialRollouts
from posttrain.rollouts.prompts import PrioritizedSampler
from posttrain.rollouts.sampling import Completion, Sampling
from tests.rollouts.sources import batches, bind, take
from tests.trainers.tiny import even_share, prompts

NUM_PROMPTS = 24


def parts_of(position, completion):
    """Rollouts that a completion takes: 1 to 3, by its place."""
    return 1 + (position + completion) % 3


def sample(groups, version):
    """One token a rollout; two completions to each prompt."""
    for group in groups:
        for i in range(2):
            if not group.completions[i:]:
                group.completions.append(Completion([], [], [], "unfinished"))
            completion = group.completions[i]
            if completion.finish_reason == "unfinished":
                for values in (completion.token_ids, completion.logps, completion.sampler_logps):
                    values.append(group.position)
                completion.policy_versions.append(version)
                ended = len(completion.token_ids) == parts_of(group.position, i)
                completion.finish_reason = "stop" if ended else "unfinished"


def score(rows, completions):
    """1 and 0 for the two completions of a prompt; the accuracy is 1 where its sum is even."""
    right = [float(sum(row["prompt_ids"]) % 2 == 0) for row in rows for _ in range(2)]
    totals = [1.0, 0.0] * len(rows)
    scores = Scores(totals, {"accuracy": right}, 0, 0, 0, {})
    return Rollout(rows, completions, [], scores, torch.tensor(totals).view(-1, 2))


class Scripted(PartialRollouts):
    """A source whose completions are those of `sample` and `score`."""

    def _sample_parts(self, number):
        sample(self.open, number)

    def _scored(self, finished):
        if not finished:
            return [], []
        rows = [self.prompts[group.row] for group in finished]
        rollout = score(rows, [group.completions for group in finished])
        of = self.partial.success_of
        return rollout.groups(), success_rates(rollout, of) if of else [None] * len(finished)


def source(*, sampler=None, staleness=0, success_of=None, updates=1, **plan):
    options = PartialOptions(
        Parts(1, staleness),
        sampler=None if sampler is None else lambda _: sampler,
        success_of=success_of,
        updates_per_rollout=updates,
    )
    made = Scripted(
        prompts(NUM_PROMPTS), {"accuracy": (even_share, 1.0)}, Sampling(3, (1,)), num_generations=2,
        advantage=lambda rewards: rewards - rewards.mean(1, keepdim=True), options=options,
    )  # fmt: skip
    return bind(made, **plan)


def positions(batch):
    """Of the groups that train: the scripted tokens are their positions."""
    return [int(g.completions[0].token_ids[0]) for g in batch if g.columns["fresh"][0][-1] == 1]


def test_a_group_trains_in_the_rollout_in_which_its_last_completion_is_finished():
    """The slower completions of positions 0 to 3 take 2, 3, 3 and 2 rollouts, that of 6, which
    starts a rollout later, 2. None is finished in the first rollout, 0 and 3 in the second, 1, 2
    and 6 in the third; two batches each."""
    found = take(source(), 6)
    assert [positions(batch) for batch in found] == [[], [], [0], [3], [1], [2, 6]]


def test_completions_that_no_newest_token_belongs_to_count_in_the_mean_and_do_not_train():
    """Position 0: completions of one and two tokens, finished in rollouts 0 and 1."""
    group = take(source(), 3)[2][0]
    assert [c.token_ids for c in group.completions] == [[0, 0]]
    assert [row.tolist() for row in group.columns["trained"]] == [[0, 1]]
    assert group.advantages.tolist() == [-0.5]  # of a group of two, whose other completion had 1
    both = take(source(staleness=1), 3)[2][0]
    assert [c.token_ids for c in both.completions] == [[0], [0, 0]]
    assert [row.tolist() for row in both.columns["fresh"]] == [[0], [0, 1]]
    assert [row.tolist() for row in both.columns["trained"]] == [[1], [1, 1]]
    assert both.advantages.tolist() == [0.5, -0.5]


def test_where_no_group_is_finished_something_runs_that_trains_nothing():
    (first, second, *_) = take(source(), 2)
    assert [len(first), len(second)] == [1, 1]
    assert first[0].columns["trained"][0].tolist() == [0.0]
    assert first[0].advantages.tolist() == [0.0]


def test_updates_without_a_group_come_after_those_that_have_one():
    """Four updates a rollout, none, two and three groups: as above, one prompt a batch."""
    found = take(source(prompts_per_batch=1, accumulation=1, updates=4), 12)
    trained = [positions(batch) for batch in found]
    assert trained == [[], [], [], [], [0], [3], [], [], [1], [2], [6], []]


def test_over_time_as_many_groups_train_as_are_started():
    """24 prompts in order, four a rollout: after eight rollouts the first six are used up."""
    found = take(source(), 2 * 8)
    trained = sorted(p for batch in found for p in positions(batch))
    assert trained[:24] == list(range(24))
    assert len(trained) == len(set(trained))


def test_metrics_count_what_waits_and_what_the_newest_policy_wrote():
    one = source()
    take(one, 4)
    notes = one.notes
    first, second = ({name: (total, count) for name, total, count in part}
                     for part in (notes[:2], notes[2:]))  # fmt: skip
    # Of 8 completions, those of one part have ended: one each of positions 0, 2 and 3.
    assert first == {"unfinished_completions": (5, 8), "finished_groups": (0, 4)}
    assert second["finished_groups"] == (2, 4)
    assert second["on_policy_tokens"] == (2, 6)  # groups 0 and 3: 1 + 2 tokens each
    assert second["repetition_stops"] == (0, 4)


def test_the_sampler_hears_of_each_finished_group_once():
    data = prompts(NUM_PROMPTS)
    sampler = PrioritizedSampler(NUM_PROMPTS, seed=0)
    one = source(sampler=sampler, success_of="accuracy")
    take(one, 2 * 6)
    assert 8 < len(sampler.found) < NUM_PROMPTS
    for row, rate in sampler.found.items():
        assert rate == float(sum(data[row]["prompt_ids"]) % 2 == 0)
    assert sampler.busy == {group.row for group in one.open}


def test_success_rates_leave_out_what_could_not_be_scored():
    scores = Scores([], {"r": [1.0, None, None, None, 3.0, 0.5]}, 0, 0, 0, {})
    rollout = SimpleNamespace(scores=scores, completions=[[0, 0]] * 3)
    assert success_rates(rollout, "r") == [1.0, None, 1.0]


def test_ranks_and_accumulation_steps_cut_the_same_updates(monkeypatch):
    """One rank x 4 batches, two ranks x 2: the same groups in each of two updates."""
    one = source(accumulation=2, updates=2)
    whole = [sorted(p for b in both for p in positions(b)) for both in pairs(take(one, 12))]
    ranks = [source(accumulation=1, updates=2, rank=rank, world_size=2) for rank in range(2)]
    found = lockstep(ranks, rollouts=3, monkeypatch=monkeypatch)
    assert [sorted(positions(a) + positions(b)) for a, b in zip(*found, strict=True)] == whole
    assert any(whole)


def pairs(items):
    return list(zip(items[::2], items[1::2], strict=True))


def lockstep(ranks, *, rollouts, monkeypatch):
    """Batches of two ranks, each in a thread, which meet wherever they gather."""
    meeting, said = threading.Barrier(2), [None, None]
    number_of = threading.local()

    def gather(mine):
        said[number_of.rank] = mine
        meeting.wait(20)
        everyone = list(said)
        meeting.wait(20)
        return everyone

    for module in (partial_source, credit):
        monkeypatch.setattr(module, "from_all_ranks", gather)
    monkeypatch.setattr(credit, "rank_and_world", lambda: (number_of.rank, 2))

    def run(rank):
        number_of.rank = rank
        return take(ranks[rank], 2 * rollouts)

    with ThreadPoolExecutor(2) as threads:
        return list(threads.map(run, range(2)))


def test_seeds_follow_the_position_and_the_run_seed():
    one = source(seed=3)
    take(one, 1)
    assert [group.seed for group in one.open] == [3 * SEED_STRIDE + i for i in range(4)]


def facts(found):
    return [
        [([c.token_ids for c in g.completions], g.advantages.tolist()) for g in batch]
        for batch in found
    ]


def test_a_restored_source_continues_where_the_first_would_have():
    """Through JSON, with unfinished completions; with an empty buffer it would not."""

    def make():
        return source(sampler=PrioritizedSampler(NUM_PROMPTS, seed=0), success_of="accuracy")

    whole = make()
    steps = batches(whole)
    for _ in range(6):
        next(steps)
    state = json.loads(json.dumps(whole.state_dict()))
    assert state["open"]
    expected = facts([next(steps) for _ in range(6)])
    for open_groups, same in ((state["open"], True), ([], False)):
        resumed = make()
        resumed.load_state_dict({**state, "open": open_groups}, 3)
        assert (facts(take(resumed, 6, first_rollout=3)) == expected) is same


@pytest.mark.parametrize(("name", "value"), [("world_size", 2), ("next_rollout", 7)])
def test_the_state_of_other_ranks_or_another_rollout_is_refused(name, value):
    one = source()
    with pytest.raises(DataError, match="Resume with the number of processes"):
        one.load_state_dict({**one.state_dict(), name: value}, 0)
