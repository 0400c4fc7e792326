"""The pairs that MinHash finds, against each text compared with each."""

import itertools
import random

import pytest

from posttrain.hygiene.minhash import MAX_MEMBERS, WINDOW, Sketches

WORDS = [f"w{number}" for number in range(400)]


def similar_pairs(texts, threshold=0.6, guards=None):
    sketches = Sketches()
    for text, guard in zip(texts, guards or [""] * len(texts), strict=True):
        sketches.add(text, guard)
    found = sketches.similar_pairs(threshold)
    triples = zip(*(column.tolist() for column in found), strict=True)
    return {(earlier, later): similarity for earlier, later, similarity in triples}


def jaccard(one, other):
    one, other = ({*text, *itertools.pairwise(text)} for text in (one, other))
    return len(one & other) / len(one | other)


def families(num_families=60, size=4, length=20, seed=0):
    """Texts of which each family shares most words."""
    draw = random.Random(seed)
    for _ in range(num_families):
        base = [draw.choice(WORDS) for _ in range(length)]
        for changes in range(size):
            text = list(base)
            for _ in range(changes):
                text[draw.randrange(length)] = draw.choice(WORDS)
            yield text


def test_what_is_found_has_jaccards_index_and_what_is_missed_is_little():
    texts = list(families())
    true = {
        (i, j): value
        for j in range(len(texts))
        for i in range(j)
        if (value := jaccard(texts[i], texts[j])) >= 0.6
    }
    found = similar_pairs(texts)
    assert len(true) > 100
    assert found == pytest.approx({pair: true[pair] for pair in found})
    assert len(found) >= 0.99 * len(true)


def test_seven_words_with_one_exchanged_are_at_the_formula_of_the_header():
    """(2 * 7 - 4) / (2 * 7 + 2) = 10 / 16."""
    text = WORDS[:7]
    other = [*text[:3], "other", *text[4:]]
    assert similar_pairs([text, other]) == {(0, 1): 0.625}


def test_texts_with_different_guards_are_never_similar():
    text = WORDS[:20]
    assert similar_pairs([text, text], guards=["3", "4"]) == {}
    assert similar_pairs([text, text], guards=["3", "3"]) == {(0, 1): 1.0}


def test_the_similarity_of_long_texts_is_right_to_a_few_hundredths():
    draw = random.Random(1)
    one = [f"word{number}" for number in range(4 * MAX_MEMBERS)]
    other = [f"new{i}" if draw.random() < 0.05 else word for i, word in enumerate(one)]
    exact = jaccard(one, other)
    assert 0.7 < exact < 0.9
    assert similar_pairs([one, other])[0, 1] == pytest.approx(exact, abs=0.05)


def test_a_bucket_wider_than_the_window_is_still_joined_to_its_first_text():
    template = [f"t{number}" for number in range(30)]
    texts = [[*template, f"filling{number}"] for number in range(20 * WINDOW)]
    found = similar_pairs(texts)
    assert {(0, later) for later in range(1, len(texts))} <= found.keys()
    assert len(found) < 50 * len(texts)  # and not each with each, 320 times


def test_a_text_like_many_is_compared_with_few_of_them():
    """Each of 300 exchanges three words of thirty: nearly all of 44,850 pairs are similar."""
    draw = random.Random(0)
    texts = [[f"t{number}" for number in range(30)] for _ in range(300)]
    for number, text in enumerate(texts):
        for place in draw.sample(range(30), 3):
            text[place] = f"new{number}"
    found = similar_pairs(texts)
    assert len({later for _, later in found}) >= 295
    assert len(found) < 45 * len(texts)


def test_nothing_is_similar_to_nothing():
    assert similar_pairs([]) == {}
    assert similar_pairs([["alone"]]) == {}
