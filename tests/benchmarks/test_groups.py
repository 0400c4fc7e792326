"""Completions of the RL benchmarks have planned lengths, and the peer is made to keep to them."""

from pathlib import Path

import torch

from benchmarks.groups import MAX_COMPLETION, NUM_GENERATIONS, GroupConfig, force_stops, make_groups
from benchmarks.workload import EOS_ID, SIZES


def completions_of(config: GroupConfig) -> list[list[int]]:
    groups = make_groups(10, config, SIZES["tiny"], Path())
    assert all(len(group["completions"]) == NUM_GENERATIONS for group in groups)
    return [completion for group in groups for completion in group["completions"]]


def test_completions_of_varied_length_end_in_eos_unless_they_are_cut():
    completions = completions_of(GroupConfig())
    lengths = [len(completion) for completion in completions]
    assert min(lengths) < MAX_COMPLETION / 2
    assert max(lengths) == MAX_COMPLETION
    assert all(
        completion[-1] == EOS_ID for completion in completions if len(completion) < MAX_COMPLETION
    )
    assert not any(EOS_ID in completion[:-1] for completion in completions)


def test_completions_of_full_length_have_no_end():
    completions = completions_of(GroupConfig(full_length=True))
    assert {len(completion) for completion in completions} == {MAX_COMPLETION}
    assert not any(EOS_ID in completion for completion in completions)


def test_the_peer_samples_eos_where_the_plan_says_and_nowhere_before():
    """Two prompt slots and one token of a completion: the second is due in the first row alone."""
    scores = force_stops([2, 3], 2, torch.zeros(2, 3, dtype=torch.long), torch.zeros(2, 5))
    probabilities = scores.softmax(-1)
    assert probabilities[0, EOS_ID] == 1
    assert probabilities[1, EOS_ID] == 0
    assert torch.equal(probabilities[1, 1:], torch.full((4,), 0.25))
