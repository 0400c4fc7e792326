"""Planned answers of the RL benchmarks: their lengths, and how the peer is made to keep to them."""

from pathlib import Path

import torch

from benchmarks.groups import ANSWERS, MAX_ANSWER, GroupConfig, force_stops, make_groups
from benchmarks.workload import EOS_ID, SIZES


def answers_of(config: GroupConfig) -> list[list[int]]:
    groups = make_groups(10, config, SIZES["tiny"], Path())
    assert all(len(group["answers"]) == ANSWERS for group in groups)
    return [answer for group in groups for answer in group["answers"]]


def test_answers_of_varied_length_end_in_eos_unless_they_are_cut():
    answers = answers_of(GroupConfig())
    lengths = [len(answer) for answer in answers]
    assert min(lengths) < MAX_ANSWER / 2
    assert max(lengths) == MAX_ANSWER
    assert all(answer[-1] == EOS_ID for answer in answers if len(answer) < MAX_ANSWER)
    assert not any(EOS_ID in answer[:-1] for answer in answers)


def test_answers_of_full_length_have_no_end():
    answers = answers_of(GroupConfig(full_length=True))
    assert {len(answer) for answer in answers} == {MAX_ANSWER}
    assert not any(EOS_ID in answer for answer in answers)


def test_the_peer_draws_eos_where_the_plan_says_and_nowhere_before():
    """Two prompt slots and one answer token: the second is due in the first row alone."""
    scores = force_stops([2, 3], 2, torch.zeros(2, 3, dtype=torch.long), torch.zeros(2, 5))
    probabilities = scores.softmax(-1)
    assert probabilities[0, EOS_ID] == 1
    assert probabilities[1, EOS_ID] == 0
    assert torch.equal(probabilities[1, 1:], torch.full((4,), 0.25))
