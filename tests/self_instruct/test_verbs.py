"""Verbs and nouns, by rules of thumb."""

from posttrain.self_instruct.verbs import count_verbs, verb_and_noun
from tests.cases import read_cases


def test_verb_and_noun():
    """Of `List, in order, the planets` the rule of thumb takes the wrong noun."""
    cases = read_cases(__file__, "verbs")
    found = [verb_and_noun(case["instruction"]) for case in cases]
    assert found == [(case["verb"], case["noun"]) for case in cases]


def test_pairs_are_counted():
    counts = count_verbs(["Write a poem.", "Write one more poem!", "Write a letter."])
    assert counts == {("write", "poem"): 2, ("write", "letter"): 1}
