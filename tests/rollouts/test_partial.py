"""Completions sampled in parts: the same while the weights stand still, each with its rollout."""

import json
from functools import partial

import pytest

from posttrain.errors import ConfigError
from posttrain.packed.prepare import prepare
from posttrain.rollouts import partial as partial_rollouts
from posttrain.rollouts.generator import HFGenerator
from posttrain.rollouts.partial import OpenGroup, Parts, sample_parts
from posttrain.rollouts.sampling import Completion, Sampling
from tests.conftest import make_model
from tests.trainers.tiny import prompts

SAMPLING = Sampling(max_tokens=10, stop_ids=(1, 2, 3, 4, 5))
NUM_ANSWERS = 4


@pytest.fixture(scope="module")
def generate():
    model = make_model()
    prepare(model)
    return HFGenerator(model).generate


def new_groups(count=6):
    rows = prompts(count)["prompt_ids"]
    return [OpenGroup(i, i, 100 + i, ids) for i, ids in enumerate(rows)]


def finish(generate, groups, settings, sampling=SAMPLING):
    """Rollout after rollout until all completions are finished; how many it took."""
    versions = 0
    while not all(group.is_finished for group in groups):
        sample_parts(
            generate, groups, version=versions, settings=settings, sampling=sampling,
            num_generations=NUM_ANSWERS,
        )  # fmt: skip
        versions += 1
    return versions


def whole_answers(generate, groups):
    prompt_ids, seeds = [g.prompt_ids for g in groups], [g.seed for g in groups]
    return generate(prompt_ids, SAMPLING, NUM_ANSWERS, seeds=seeds)


@pytest.mark.parametrize(("tokens", "rollouts"), [(None, 1), (10, 1), (99, 1), (4, 3), (1, 10)])
def test_while_the_weights_stand_still_completions_do_not_depend_on_where_they_are_cut(
    tokens, rollouts, generate
):
    """The tokens and ends of whole completions, and log-probs to rounding; 4 does not divide 10."""
    groups = new_groups()
    assert finish(generate, groups, Parts(tokens)) == rollouts
    for group, expected in zip(groups, whole_answers(generate, groups), strict=True):
        for completion, whole in zip(group.completions, expected, strict=True):
            assert completion.token_ids == whole.token_ids
            assert completion.finish_reason == whole.finish_reason
            assert completion.logps == pytest.approx(whole.logps, abs=1e-4)
            assert completion.sampler_logps == pytest.approx(whole.sampler_logps, abs=1e-4)


def test_beginnings_computed_apart_give_the_same_completions(generate, monkeypatch):
    """A few at a time, of different lengths in a batch, as where memory is short."""
    together, apart = new_groups(), new_groups()
    finish(generate, together, Parts(4))
    monkeypatch.setattr(partial_rollouts, "PREFILL_TOKENS", 30)
    assert finish(generate, apart, Parts(4)) == 3
    assert [[a.token_ids for a in g.completions] for g in apart] == [
        [a.token_ids for a in g.completions] for g in together
    ]


def test_completions_of_different_ages_go_on_together(generate):
    """Half of the groups start a rollout later; all end as whole completions do."""
    early, late = new_groups()[:3], new_groups()[3:]
    settings = {"settings": Parts(4), "sampling": SAMPLING}
    sample_parts(generate, early, version=0, num_generations=NUM_ANSWERS, **settings)
    finish(generate, [*early, *late], Parts(4))
    groups = [*early, *late]
    for group, expected in zip(groups, whole_answers(generate, groups), strict=True):
        assert [a.token_ids for a in group.completions] == [a.token_ids for a in expected]
        assert [a.finish_reason for a in group.completions] == [a.finish_reason for a in expected]


def test_each_token_knows_the_rollout_that_sampled_it(generate):
    """Four tokens a rollout: 0 0 0 0 1 1 1 1 2 2, as far as a completion goes."""
    groups = new_groups()
    finish(generate, groups, Parts(4))
    answers = [completion for group in groups for completion in group.completions]
    versions = [0, 0, 0, 0, 1, 1, 1, 1, 2, 2]
    for completion in answers:
        assert completion.policy_versions == versions[: len(completion.token_ids)]
    assert {completion.policy_versions[-1] for completion in answers} == {0, 1, 2}


def test_a_finished_completion_is_not_sampled_on(generate):
    groups, asked = new_groups(), []

    def spy(prompt_ids, *arguments, **settings):
        asked.append(len(prompt_ids))
        return generate(prompt_ids, *arguments, **settings)

    sample = partial(
        sample_parts, spy, groups, settings=Parts(4), sampling=SAMPLING,
        num_generations=NUM_ANSWERS,
    )  # fmt: skip
    sample(version=0)
    waiting = sum(len(group.unfinished) for group in groups)
    assert 0 < waiting < len(groups) * NUM_ANSWERS
    sample(version=1)
    assert asked == [len(groups), waiting]


class Scripted:
    """Goes on with the next tokens of one completion, 7 7 7 …, or ends it where `stop` says."""

    def __init__(self, stop=None):
        self.stop = stop

    def __call__(self, _prompt_ids, sampling, _answers_per_prompt, *, seeds):
        count = sampling.max_tokens
        found = []
        for seed in seeds:
            end = None if self.stop is None else self.stop - seed.start
            stops = end is not None and end <= count
            ids = [7] * (end - 1) + [1] if stops else [7] * count
            reason = "stop" if stops else "length"
            found.append([Completion(ids, [-1.0] * len(ids), [-1.0] * len(ids), reason)])
        return found


@pytest.mark.parametrize(
    ("loop_tokens", "stop", "expected"),
    [
        (0, None, ("length", 10)),
        (3, None, ("repetition", 4)),  # seen when the first part is used up
        (6, None, ("repetition", 8)),
        (6, 8, ("stop", 8)),  # it ended by itself
        (0, 10, ("stop", 10)),
        (0, 11, ("length", 10)),  # beyond the limit of a whole completion
        (10, None, ("repetition", 10)),  # cut at the limit too, but a loop first of all
    ],
)
def test_how_a_completion_ends(loop_tokens, stop, expected):
    group = OpenGroup(0, 0, 0, [9])
    while not group.is_finished:
        sample_parts(
            Scripted(stop), [group], version=0, settings=Parts(4, 0, loop_tokens),
            sampling=SAMPLING, num_generations=1,
        )  # fmt: skip
    (completion,) = group.completions
    assert (completion.finish_reason, len(completion.token_ids)) == expected


def test_of_a_part_that_is_too_long_for_one_completion_the_rest_is_cut_off():
    """Answers of 8 and 4 tokens get 4 more, the last a stop: the first has room for 2 of them."""
    waiting = [Completion([7] * n, [-1.0] * n, [-1.0] * n, "unfinished", [0] * n) for n in (8, 4)]
    group = OpenGroup(0, 0, 0, [9], waiting)

    def generate(prompt_ids, sampling, _answers_per_prompt, *, seeds):
        assert [len(ids) for ids in prompt_ids] == [9, 5]
        assert (sampling.max_tokens, [seed.start for seed in seeds]) == (4, [8, 4])
        return [[Completion([7, 7, 7, 1], [-2.0] * 4, [-2.0] * 4, "stop")] for _ in prompt_ids]

    sample_parts(
        generate, [group], version=1, settings=Parts(4), sampling=SAMPLING,
        num_generations=2,
    )  # fmt: skip
    cut, ended = group.completions
    assert (cut.token_ids, cut.finish_reason) == ([7] * 10, "length")
    assert (ended.token_ids, ended.finish_reason) == ([7] * 7 + [1], "stop")
    assert cut.policy_versions == [0] * 8 + [1] * 2
    assert cut.logps == cut.sampler_logps == [-1.0] * 8 + [-2.0] * 2


def test_an_open_group_survives_json(generate):
    (group, *_) = groups = new_groups(2)
    sample_parts(
        generate, groups, version=3, settings=Parts(2), sampling=SAMPLING,
        num_generations=NUM_ANSWERS,
    )  # fmt: skip
    state = json.loads(json.dumps(group.state_dict()))
    assert [Completion(**completion) for completion in state["completions"]] == group.completions


def test_settings_that_cannot_be_are_refused():
    with pytest.raises(ConfigError, match="tokens_per_rollout >= 1, or None"):
        Parts(0)
    with pytest.raises(ConfigError, match="max_staleness >= 0 and loop_tokens of 0, or 3"):
        Parts(4, -1, 2)
    with pytest.raises(ConfigError, match="expected no stop strings, which are missed"):
        Parts(4).check(Sampling(10, (1,), stop_strings=("END",)))
    with pytest.raises(ConfigError, match=r"at least min_tokens \(5\), found 4"):
        Parts(4).check(Sampling(10, (1,), min_tokens=5))
    for tokens in (None, 10):
        with pytest.raises(ConfigError, match=r"max_staleness 1: expected .* below .*10 tokens"):
            Parts(tokens, 1).check(Sampling(10, (1,)))
    with pytest.raises(ConfigError, match=r"loop_tokens: expected at most .*10 tokens"):
        Parts(4, 1, 11).check(Sampling(10, (1,)))
    Parts(9, 1, 10).check(Sampling(10, (1,)))
    Parts().check(Sampling(10, (1,), stop_strings=("END",), min_tokens=5))
