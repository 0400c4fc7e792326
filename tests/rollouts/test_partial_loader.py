"""The loader of partial rollouts on scripted answers: what trains when, in which update, on which
rank."""

import json
from types import SimpleNamespace

import pytest
import torch

from posttrain.errors import DataError
from posttrain.rewards.call import Scores
from posttrain.rollouts import partial_loader
from posttrain.rollouts.group import Rollout, success_rates
from posttrain.rollouts.partial import PartialRollouts
from posttrain.rollouts.partial_loader import PartialRolloutLoader
from posttrain.rollouts.prompts import SEED_STRIDE, InOrderSampler, PrioritizedSampler
from posttrain.rollouts.sampling import Completion
from posttrain.rollouts.source import RolloutPlan
from tests.trainers.tiny import prompts

NUM_PROMPTS = 24


def parts_of(position, answer):
    """Rollouts that an answer takes: 1 to 3, by its place."""
    return 1 + (position + answer) % 3


def draw(groups, version):
    """One token a rollout; two answers to each prompt."""
    for group in groups:
        for i in range(2):
            if not group.answers[i:]:
                group.answers.append(Completion([], [], [], "unfinished"))
            answer = group.answers[i]
            if answer.finish_reason == "unfinished":
                for values in (answer.token_ids, answer.logps, answer.sampler_logps):
                    values.append(group.position)
                answer.policy_versions.append(version)
                ended = len(answer.token_ids) == parts_of(group.position, i)
                answer.finish_reason = "stop" if ended else "unfinished"


def score(rows, completions):
    """1 and 0 for the two answers to a prompt; the accuracy is 1 for prompts with an even sum."""
    right = [float(sum(row["prompt_ids"]) % 2 == 0) for row in rows for _ in range(2)]
    totals = [1.0, 0.0] * len(rows)
    scores = Scores(totals, {"accuracy": right}, 0, 0, 0, {})
    return Rollout(rows, completions, [], scores, torch.tensor(totals).view(-1, 2))


def loader(*, plan=None, sampler=None, notes=None, rollouts=None, **settings):
    data = prompts(NUM_PROMPTS)
    return PartialRolloutLoader(
        data, plan or RolloutPlan(2, 2, seed=0), PartialRollouts(1, settings.pop("staleness", 0)),
        sampler=sampler or InOrderSampler(NUM_PROMPTS, seed=0), draw=draw, score=score,
        advantage=lambda rewards: rewards - rewards.mean(1, keepdim=True),
        on_rollout=([] if rollouts is None else rollouts).append,
        finish_batch=lambda groups: groups,
        note=lambda name, total, count: notes is not None and notes.append((name, total, count)),
        **settings,
    )  # fmt: skip


def take(one, count):
    batches = iter(one)
    return [next(batches) for _ in range(count)]


def positions(batch):
    """Of the groups that train: the scripted tokens are their positions."""
    return [g["answers"][0][0] for g in batch if g["ages"][0][-1] == 0]


def test_a_group_trains_in_the_rollout_in_which_its_last_answer_is_finished():
    """The slower answers of positions 0 to 3 take 2, 3, 3 and 2 rollouts, that of 6, which starts a
    rollout later, 2. None is finished in the first rollout, 0 and 3 in the second, 1, 2 and 6 in
    the third; two batches each."""
    found = take(loader(), 6)
    assert [positions(batch) for batch in found] == [[], [], [0], [3], [1], [2, 6]]


def test_answers_that_no_newest_token_belongs_to_count_in_the_mean_and_do_not_train():
    """Position 0: answers of one and two tokens, finished in rollouts 0 and 1."""
    group = take(loader(), 3)[2][0]
    assert group["answers"] == [[0, 0]]
    assert group["ages"] == [[1, 0]]
    assert group["advantages"] == [-0.5]  # of a group of two, whose other answer had 1
    both = take(loader(staleness=1), 3)[2][0]
    assert both["answers"] == [[0], [0, 0]]
    assert both["ages"] == [[1], [1, 0]]
    assert both["advantages"] == [0.5, -0.5]


def test_where_no_group_is_finished_something_runs_that_trains_nothing():
    (first, second, *_) = take(loader(), 2)
    assert [len(first), len(second)] == [1, 1]
    assert first[0]["ages"] == [[1]]
    assert first[0]["advantages"] == [0.0]


def test_updates_without_a_group_come_after_those_that_have_one():
    """Four updates a rollout, none, two and three groups: as above, one prompt a batch."""
    found = take(loader(plan=RolloutPlan(1, 4, seed=0), updates_per_rollout=4), 12)
    trained = [positions(batch) for batch in found]
    assert trained == [[], [], [], [], [0], [3], [], [], [1], [2], [6], []]


def test_over_time_as_many_groups_train_as_are_started():
    """24 prompts in order, four a rollout: after eight rollouts the first six are used up."""
    found = take(loader(), 2 * 8)
    trained = sorted(p for batch in found for p in positions(batch))
    assert trained[:24] == list(range(24))
    assert len(trained) == len(set(trained))


def test_metrics_count_what_waits_and_what_the_newest_policy_wrote():
    notes = []
    take(loader(notes=notes), 4)
    first, second = ({name: (total, count) for name, total, count in part}
                     for part in (notes[:2], notes[2:]))  # fmt: skip
    # Of 8 answers, those of one part have ended: one each of positions 0, 2 and 3.
    assert first == {"unfinished_answers": (5, 8), "finished_groups": (0, 4)}
    assert second["finished_groups"] == (2, 4)
    assert second["on_policy_tokens"] == (2, 6)  # groups 0 and 3: 1 + 2 tokens each
    assert second["repetition_stops"] == (0, 4)


def test_the_sampler_hears_of_each_finished_group_once():
    data = prompts(NUM_PROMPTS)
    sampler = PrioritizedSampler(NUM_PROMPTS, seed=0)
    one = loader(sampler=sampler, success_of="accuracy")
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
    one = loader(plan=RolloutPlan(2, 4, seed=0), updates_per_rollout=2)
    whole = [sorted(p for b in take_two for p in positions(b)) for take_two in pairs(take(one, 12))]
    ranks = [
        loader(plan=RolloutPlan(2, 2, seed=0, rank=rank, world_size=2), updates_per_rollout=2)
        for rank in range(2)
    ]
    found = lockstep(ranks, rollouts=3, monkeypatch=monkeypatch)
    assert [sorted(positions(a) + positions(b)) for a, b in zip(*found, strict=True)] == whole
    assert any(whole)


def pairs(items):
    return list(zip(items[::2], items[1::2], strict=True))


def lockstep(ranks, *, rollouts, monkeypatch):
    """Batches of two ranks in one process: each first says what it would gather."""
    found = [[], []]
    for number in range(rollouts):
        gathered = [_says(one, number, monkeypatch) for one in ranks]
        monkeypatch.setattr(partial_loader, "from_all_ranks", lambda _, all_=gathered: all_)
        for one, batches in zip(ranks, found, strict=True):
            batches += one._batches(number)
    return found


def _says(one, number, monkeypatch):
    """What a rank would hand to the others in this rollout; it stays as it was."""
    state, said = json.loads(json.dumps(one.state_dict())), []

    def hear(mine):
        said.append(mine)
        return [mine, mine]

    monkeypatch.setattr(partial_loader, "from_all_ranks", hear)
    one._batches(number)
    one.open = []
    one.load_state_dict(state)
    return said[0]


def test_seeds_follow_the_position_and_the_run_seed():
    one = loader(plan=RolloutPlan(2, 2, seed=3))
    take(one, 1)
    assert [group.seed for group in one.open] == [3 * SEED_STRIDE + i for i in range(4)]


def test_a_restored_loader_goes_on_where_the_first_would_have():
    """Through JSON, with answers in the making; with an empty buffer it would not."""

    def make():
        return loader(sampler=PrioritizedSampler(NUM_PROMPTS, seed=0), success_of="accuracy")

    whole = make()
    batches = iter(whole)
    for _ in range(6):
        next(batches)
    state = json.loads(json.dumps(whole.state_dict()))
    assert state["open"]
    expected = [next(batches) for _ in range(6)]
    for open_groups, same in ((state["open"], True), ([], False)):
        resumed = make()
        resumed.first_rollout = 3
        resumed.load_state_dict({**state, "open": open_groups})
        assert (take(resumed, 6) == expected) is same


@pytest.mark.parametrize(("name", "value"), [("world_size", 2), ("next_rollout", 7)])
def test_the_state_of_other_ranks_or_another_rollout_is_refused(name, value):
    one = loader()
    with pytest.raises(DataError, match="Resume with the number of processes"):
        one.load_state_dict({**one.state_dict(), name: value})
