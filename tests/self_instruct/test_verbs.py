"""Verbs and nouns, by rules of thumb."""

from posttrain.self_instruct.verbs import count_verbs, verb_and_noun

PAIRS = [
    ("Write a short poem about the sea.", ("write", "poem")),
    ("Please convert 5 kilometres to miles.", ("convert", "kilometres")),
    ("Given the two lists, merge them into one sorted list.", ("merge", "list")),
    ("Can you explain the offside rule to me?", ("explain", "rule")),
    ("What is the capital of Peru?", ("what", "capital")),
    ("Summarise.", ("summarise", "")),
    ("List, in order, the planets.", ("list", "order")),  # the rule of thumb is wrong here
    ("!?", ("", "")),
    ("", ("", "")),
]


def test_verb_and_noun():
    found = [(instruction, verb_and_noun(instruction)) for instruction, _ in PAIRS]
    assert found == PAIRS


def test_pairs_are_counted():
    counts = count_verbs(["Write a poem.", "Write one more poem!", "Write a letter."])
    assert counts == {("write", "poem"): 2, ("write", "letter"): 1}
