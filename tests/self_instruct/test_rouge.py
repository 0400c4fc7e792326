"""ROUGE-L against its definition, and the pool against comparing with everything."""

import functools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from posttrain.self_instruct.rouge import NoveltyPool, rouge_l, rouge_tokens

# The golden case self_instruct_rouge_l: (one, other, F1, rejected at 0.7).
GOLDEN = [
    ("Write a short poem about the sea.", "Write a short poem about the moon.", 6 / 7, True),
    ("Summarize the article below.", "Explain how rainbows form.", 0.0, False),
    ("List three uses of AI.", "list THREE uses, of ai", 1.0, True),
    ("a b c d e f g", "g f e d c b a", 1 / 7, False),
]
WORDS = ["a", "the", "of", "write", "list", "give", "word", "text", "cat", "sea", "poem", "3"]


@functools.cache  # the thresholds compare the same texts
def reference(one: str, other: str) -> float:
    """F1 of precision and recall of the longest common subsequence, by dynamic programming."""
    first, second = rouge_tokens(one), rouge_tokens(other)
    row = [0] * (len(second) + 1)
    for token in first:
        above = row[:]
        for place, word in enumerate(second, start=1):
            matched = above[place - 1] + 1 if token == word else 0
            row[place] = max(matched, above[place], row[place - 1])
    if not row[-1]:
        return 0.0
    precision, recall = row[-1] / len(first), row[-1] / len(second)
    return 2 * precision * recall / (precision + recall)


def random_text(draw: random.Random, most: int = 25) -> str:
    return " ".join(draw.choice(WORDS) for _ in range(draw.randrange(most)))


def similar_texts(seed: int, count: int) -> list[str]:
    """Half of them are an earlier one with a few words changed: many lie around 0.7."""
    draw, texts = random.Random(seed), []
    for _ in range(count):
        words = random_text(draw, 40).split()
        if texts and draw.random() < 0.5:
            words = draw.choice(texts).split()
            for _ in range(draw.randrange(1, 6)):
                words.insert(draw.randrange(len(words) + 1), draw.choice(WORDS))
                del words[draw.randrange(len(words))]
        texts.append(" ".join(words))
    return texts


def test_golden_case():
    for one, other, score, rejected in GOLDEN:
        assert rouge_l(one, other) == pytest.approx(score, abs=1e-12), one
        assert (NoveltyPool([one]).too_similar(other) is not None) is rejected, one


def test_thousands_of_pairs_equal_the_definition():
    draw = random.Random(1)
    for _ in range(4_000):
        one, other = random_text(draw), random_text(draw)
        assert rouge_l(one, other) == pytest.approx(reference(one, other), abs=1e-6)


def test_tokens_are_runs_of_ascii_letters_and_digits_in_lower_case():
    assert rouge_tokens("Don't SAY naïve_2x!") == ["don", "t", "say", "na", "ve", "2x"]


@pytest.mark.parametrize("threshold", [0.5, 0.7, 0.9])
def test_the_pool_accepts_and_rejects_exactly_as_comparing_with_everything(threshold):
    pool, kept, num_rejected = NoveltyPool(threshold=threshold), [], 0
    for text in similar_texts(7, 160):
        scores = [reference(text, other) for other in kept]
        # An F1 of exactly the threshold is new; the reference, rounded thrice, may lie above it.
        is_new = max(scores, default=0) <= threshold + 1e-9
        found = pool.too_similar(text)
        assert (found is None) is is_new, text
        if found is None:
            pool.add(text)
            kept.append(text)
        else:
            num_rejected += 1
            assert found.score == pytest.approx(max(scores))
            assert found.text == kept[scores.index(max(scores))]
    assert num_rejected > 20
    assert len(kept) > 20


def test_exactly_the_threshold_is_new_and_one_token_more_is_not():
    """63 of 90 common tokens are 2·63/180 = 0.7, though 0.7·180 rounds to less than 126."""
    assert 0.7 * 180 < 126
    base = [f"w{i}" for i in range(90)]
    at = " ".join(base[:63] + [f"x{i}" for i in range(27)])
    above = " ".join(base[:64] + [f"x{i}" for i in range(26)])
    assert NoveltyPool([" ".join(base)]).too_similar(at) is None
    assert NoveltyPool([" ".join(base)]).too_similar(above).score == pytest.approx(128 / 180)


# Letters, digits and what parts them, in and out of ASCII; all of Unicode is slow to set up.
TEXTS = st.text(alphabet="aB3 é_-\n漢😀", max_size=40)


@given(TEXTS, TEXTS)
def test_any_text_is_scored_alike_from_both_sides(one, other):
    assert rouge_l(one, other) == rouge_l(other, one)
    assert 0 <= rouge_l(one, other) <= 1
    assert rouge_l(one, one) == (1 if rouge_tokens(one) else 0)


def test_a_text_without_tokens_is_like_nothing():
    assert NoveltyPool(["!!!", "a b c"]).too_similar("???") is None


def test_the_pool_grows_beyond_its_first_room_and_tells_many_tokens_apart():
    """Token 55,296 and those after it would be surrogates, were they sent anywhere as text."""
    pool = NoveltyPool(f"word{i} other{i} third{i} token{i}" for i in range(16_000))
    assert len(pool) == 16_000
    assert pool.too_similar("word15999 other15999 third15999 token15999").score == 1
    assert pool.too_similar("word15999 other15998 third15997 token15996") is None
