"""Made-up examples are as long as real ones, and their useful work is counted right."""

import random

import pytest

from benchmarks.flops import Work, shared_prompt
from benchmarks.workload import (
    EOS_ID,
    GSM8K_ANSWER,
    HH_PROMPT,
    HH_REJECTED,
    SIZES,
    made_documents,
    made_pairs,
)


@pytest.mark.parametrize(
    ("lengths", "mean"), [(HH_PROMPT, 123), (HH_REJECTED, 51), (GSM8K_ANSWER, 93)]
)
def test_made_up_lengths_have_the_quantiles_and_the_mean_of_the_data(lengths, mean):
    dice = random.Random(0)
    sampled = sorted(lengths.sample(dice) for _ in range(20_000))
    for share, expected in ((0.05, lengths.low), (0.5, lengths.median), (0.95, lengths.high)):
        assert sampled[int(share * len(sampled))] == pytest.approx(expected, rel=0.05, abs=1)
    assert sampled[-1] <= lengths.longest
    assert sum(sampled) / len(sampled) == pytest.approx(mean, rel=0.1)


def test_made_up_examples_are_the_same_for_a_seed_and_end_where_completions_end():
    documents = made_documents(20, vocabulary=100, seed=3)
    assert documents == made_documents(20, vocabulary=100, seed=3)
    assert documents != made_documents(20, vocabulary=100, seed=4)
    for document in documents:
        ids, trained = document["input_ids"], document["trained"]
        assert (ids[-1], trained[-1], trained[0]) == (EOS_ID, True, False)
        assert ids.count(EOS_ID) == 1
        assert max(ids) < 100
    pairs = made_pairs(20, vocabulary=100)
    assert all(pair["rejected_ids"][-1] == EOS_ID for pair in pairs)


def test_useful_work_counts_a_shared_prompt_once():
    """By hand: 2 prompt tokens see 1 + 2 keys, a completion of 1 sees 3, one of 2 sees 3 + 4."""
    assert shared_prompt(2, [1, 2]) == Work(tokens=5, scored=3, seen=13)


def test_flops_of_one_token_are_two_a_weight_forward_and_six_in_training():
    size = SIZES["small"]
    one = Work(tokens=1, scored=1, seen=0)
    weights = 8 * (4 * 512**2 + 3 * 512 * 1280) + 512 * 16_384
    assert one.forward_flops(size) == 2 * weights
    assert one.training_flops(size) == 6 * weights


def test_sizes_have_the_parameters_that_they_are_named_for():
    millions = {
        name: (size.linear_parameters + size.vocabulary * size.hidden) / 1e6
        for name, size in SIZES.items()
    }
    sizes = {"tiny": 1, "small": 32, "smollm2": 135, "base": 160, "1b": 1236}
    sizes |= {"qwen3_5": 4.4, "gpt_oss": 3.7}
    assert millions == pytest.approx(sizes, rel=0.06)
