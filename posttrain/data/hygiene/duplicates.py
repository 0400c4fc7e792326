"""Which texts repeat an earlier one: to the letter, in other dress, or but for a word.

found = find_duplicates(keys)
found.kept[7] == 2        # text 7 repeats text 2, which stays
found.clusters()[7]       # the smallest place that text 7 is connected with, directly or not
"""

from array import array
from collections.abc import Iterable
from dataclasses import dataclass

import numpy

from posttrain.data.hygiene.keys import Key
from posttrain.data.hygiene.minhash import SimilarPairs, Sketches
from posttrain.data.hygiene.rows import text_hash
from posttrain.data.hygiene.words import words_of

THRESHOLD = 0.6  # a text of seven words still counts as the same when one of them is exchanged


@dataclass
class Duplicates:
    """For each text, in order: `hashes` of its key, and its `original`.

    original: the first text of the same words, digits and signs, itself if there is none.
    pairs: originals that are similar.
    """

    hashes: numpy.ndarray
    original: numpy.ndarray
    pairs: SimilarPairs

    def __post_init__(self) -> None:
        self.kept, self.similarity = self._keep_first()

    def is_exact(self, place: int) -> bool:
        """Whether the text is the one that it repeats, to the letter."""
        return self.hashes[place] == self.hashes[self.kept[place]]

    def _keep_first(self) -> tuple[numpy.ndarray, numpy.ndarray]:
        """For each text the one that stays for it (itself, if it stays), and their similarity.

        A text goes only if it is itself similar to one that stays: a chain of small changes does
        not make its two ends the same.
        """
        kept = numpy.arange(len(self.original))
        similarity = numpy.ones(len(self.original))
        for earlier, later, value in zip(*(column.tolist() for column in self.pairs), strict=True):
            stays = kept[earlier] == earlier
            is_nearer = kept[later] == later or value > similarity[later]
            if stays and is_nearer:
                kept[later], similarity[later] = earlier, value
        return kept[self.original], similarity[self.original]

    def clusters(self) -> numpy.ndarray:
        """For each text the first text of its cluster; similar texts are in the same one."""
        parent = numpy.arange(len(self.original))

        def root_of(place: int) -> int:
            while parent[place] != place:
                parent[place] = parent[parent[place]]  # halves the way for the next
                place = parent[place]
            return place

        for earlier, later in zip(
            self.pairs.earlier.tolist(), self.pairs.later.tolist(), strict=True
        ):
            first, second = sorted((root_of(earlier), root_of(later)))
            parent[second] = first
        roots = numpy.array([root_of(place) for place in range(len(parent))], numpy.int64)
        return roots[self.original]


def find_duplicates(
    keys: Iterable[Key], *, threshold: float = THRESHOLD, near: bool = True
) -> Duplicates:
    """Duplicates among the keys, in one pass over them.

    threshold: similarity (see minhash.py) from which on two texts are the same; above 0, up to 1.
    near: False: only texts that are the same to the letter.
    """
    sketches = Sketches()
    hashes, original = array("Q"), array("q")
    first_of: dict[int, int] = {}  # hash of a form -> the first text that has it
    originals: list[int] = []
    for place, key in enumerate(keys):
        words = words_of(key.text) or [key.text]  # what has no words equals only itself
        hashes.append(key.hash)
        form = text_hash("\0".join([key.guard, *words])) if near else hashes[-1]
        original.append(first_of.setdefault(form, place))
        if near and original[-1] == place:
            sketches.add(words, key.guard)
            originals.append(place)
    pairs = sketches.similar_pairs(threshold)
    places = numpy.array(originals, numpy.int64)
    pairs = SimilarPairs(places[pairs.earlier], places[pairs.later], pairs.similarity)
    return Duplicates(numpy.array(hashes), numpy.array(original), pairs)
