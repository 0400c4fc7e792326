"""Pairs of texts that share most of their words, among millions, without comparing each with each.

    sketches = Sketches()
    for text in texts:
        sketches.add(words_of(text), digits_and_signs(text))
    pairs = sketches.similar_pairs(threshold=0.6)

A text is the set of its words and of its pairs of neighbouring words. Two texts are as similar as
their sets: |A and B| / |A or B|, Jaccard's index. A text of n different words in which one is
exchanged has 2n - 1 members and loses 3 of them: (2n - 4) / (2n + 2), which is 0.625 for 7 words.

MinHash (Broder 1997) finds the candidates: the smallest of a set under a random order is the same
in both with probability J. Texts that agree on four such smallest in any of 40 bands are
candidates: at J = 0.6 all but 1 in 250, at J = 0.1 one in 250. Four bits of each of the 160
smallest rule most unlike candidates out (b-bit MinHash, Li and Koenig 2010); the sets of the
others, which lie in a temporary file, are compared. In memory a text takes 260 bytes, whatever its
length.
"""

from __future__ import annotations

import tempfile
import zlib
from collections.abc import Iterator, Sequence
from typing import BinaryIO, NamedTuple

import numpy

BANDS, ROWS_PER_BAND = 40, 4
BITS = 4  # kept of each smallest member: 640 bits a text
# Five standard deviations of what the bits say of J, at J = 0.6.
SLACK = 0.23
SEED = 20260101  # of the random orders: the same texts always give the same pairs
BLOCK_TEXTS = 2048  # texts hashed together: large enough for numpy, small enough for the cache
# Members kept of a longer text: a random sample, on which J is right to about 0.02.
MAX_MEMBERS = 1024
# Texts of one bucket are each compared with so many before them, and with its first. Unlike texts
# seldom meet in a bucket; a larger one holds a template's fillings, each of them like its first.
WINDOW = 32
ENOUGH = 8  # a text for which so many similar ones are found is compared with no others
BLOCK_MEMBERS = 2_000_000  # set members compared in one go
BLOCK_PAIRS = 500_000  # pairs whose bits are compared in one go
ODD, PRIME = numpy.uint64(0x9E3779B97F4A7C15), numpy.uint64(0xC2B2AE3D27D4EB4F)
HALF = numpy.uint64(32)


class SimilarPairs(NamedTuple):
    """`earlier[k] < later[k]` are places of texts, `similarity[k]` is Jaccard's index."""

    earlier: numpy.ndarray
    later: numpy.ndarray
    similarity: numpy.ndarray


class Sketches:
    """Texts, added one at a time; the place of a text is the number of texts before it."""

    def __init__(self) -> None:
        random = numpy.random.default_rng(SEED)
        self._factors = random.integers(1, 2**63, BANDS * ROWS_PER_BAND, dtype=numpy.uint64) * 2 + 1
        self._waiting: list[tuple[list[int], int]] = []  # (hashes of words, hash of the digits)
        self._bands: list[numpy.ndarray] = []  # (BANDS, texts of a block)
        self._bits: list[numpy.ndarray] = []  # (texts of a block, words of 64 bits)
        self._sizes: list[numpy.ndarray] = []  # members in the file, of each text
        self._last: list[numpy.ndarray] = []  # the largest hash that the text's sample could hold
        self._file = tempfile.TemporaryFile()  # noqa: SIM115  (it lives as long as this object)

    def add(self, words: Sequence[str], guard: str = "") -> None:
        """Add a text by its words, of which there must be one.

        guard: texts whose guards differ are never similar.
        """
        hashes = [zlib.crc32(word.encode("utf-8", "surrogatepass")) for word in words]
        self._waiting.append((hashes, zlib.crc32(guard.encode("utf-8", "surrogatepass"))))
        if len(self._waiting) == BLOCK_TEXTS:
            self._take_block()

    def similar_pairs(self, threshold: float) -> SimilarPairs:
        """All pairs found whose similarity is at least `threshold`, by `later`, then `earlier`."""
        self._take_block()
        sizes = _joined(self._sizes, numpy.int64)
        if not sizes.sum():
            nothing = numpy.zeros(0, numpy.int64)
            return SimilarPairs(nothing, nothing, numpy.zeros(0))
        sets = _Sets(self._file, sizes, _joined(self._last, numpy.uint32))
        bits = numpy.concatenate(self._bits)
        judged = numpy.zeros(0, numpy.int64)
        num_found = numpy.zeros(len(sizes), numpy.int64)
        found: list[SimilarPairs] = []
        for band in range(BANDS):
            hashes = numpy.concatenate([block[band] for block in self._bands])
            fresh = [block[_hopeful(bits, block, threshold)] for block in _pairs_in_buckets(hashes)]
            fresh = numpy.setdiff1d(numpy.concatenate(fresh), judged, assume_unique=True)
            fresh = fresh[num_found[fresh // len(sizes)] < ENOUGH]
            judged = numpy.sort(numpy.concatenate([judged, fresh]))
            found.append(sets.similar(fresh, threshold))
            num_found += numpy.bincount(found[-1].later, minlength=len(sizes))
        return _sorted(found)

    def _take_block(self) -> None:
        if not self._waiting:
            return
        members, starts = _members([hashes for hashes, _ in self._waiting])
        sizes = numpy.diff(starts, append=len(members))
        guards = numpy.array([guard for _, guard in self._waiting], numpy.uint64)
        self._hash_sets(members, starts, guards)
        in_set = numpy.arange(len(members)) - numpy.repeat(starts, sizes)
        kept = numpy.minimum(sizes, MAX_MEMBERS)
        last = members[starts + kept - 1]
        last[kept == sizes] = numpy.iinfo(numpy.uint32).max  # the set is whole
        self._file.write(members[in_set < MAX_MEMBERS].tobytes())
        self._sizes.append(kept)
        self._last.append(last)
        self._waiting = []

    def _hash_sets(
        self, members: numpy.ndarray, starts: numpy.ndarray, guards: numpy.ndarray
    ) -> None:
        """A band's hashes are equal where guards and the band's smallest members are equal."""
        wide = members.astype(numpy.uint64)
        shuffled = numpy.empty_like(wide)
        bands = numpy.empty((BANDS, len(starts)), numpy.uint32)
        bits = numpy.empty((BANDS * ROWS_PER_BAND, len(starts)), numpy.uint8)
        for number, factor in enumerate(self._factors):
            # Multiply-shift: the upper bits of a product with an odd number are well mixed.
            numpy.multiply(wide, factor, out=shuffled)
            numpy.right_shift(shuffled, HALF, out=shuffled)
            smallest = numpy.minimum.reduceat(shuffled, starts)
            bits[number] = (smallest * ODD) >> numpy.uint64(64 - BITS)
            band, row = divmod(number, ROWS_PER_BAND)
            hashes = ((guards if row == 0 else hashes) ^ smallest) * ODD
            hashes ^= hashes >> HALF
            bands[band] = hashes
        self._bands.append(bands)
        packed = bits[0::2] | bits[1::2] << BITS
        self._bits.append(numpy.ascontiguousarray(packed.T).view(numpy.uint64))


class _Sets:
    """The sets in the file, and their similarities."""

    def __init__(self, file: BinaryIO, sizes: numpy.ndarray, last: numpy.ndarray) -> None:
        file.flush()
        self.members = numpy.memmap(file, numpy.uint32, mode="r")
        self.sizes, self.last = sizes, last
        self.starts = numpy.cumsum(sizes) - sizes

    def similar(self, pairs: numpy.ndarray, threshold: float) -> SimilarPairs:
        """The pairs, and their Jaccard index, of those that reach the threshold."""
        one, other = numpy.divmod(pairs, len(self.sizes))
        small = numpy.minimum(self.sizes[one], self.sizes[other])
        large = numpy.maximum(self.sizes[one], self.sizes[other])
        places = numpy.flatnonzero(small >= threshold * large)
        similarity = numpy.zeros(len(pairs))
        for block in _blocks(places, large[places]):
            similarity[block] = self._compare(one[block], other[block])
        reached = similarity >= threshold
        return SimilarPairs(other[reached], one[reached], similarity[reached])

    def _compare(self, one: numpy.ndarray, other: numpy.ndarray) -> numpy.ndarray:
        # Of two samples, both are whole up to the smaller of the two largest hashes.
        last = numpy.minimum(self.last[one], self.last[other])
        first, second = self._keyed(one, last), self._keyed(other, last)
        place = numpy.minimum(numpy.searchsorted(second, first), len(second) - 1)
        shared = first[second[place] == first]
        counts = [
            numpy.bincount((keys >> HALF).astype(numpy.int64), minlength=len(one))
            for keys in (first, second, shared)
        ]
        return counts[2] / (counts[0] + counts[1] - counts[2])

    def _keyed(self, texts: numpy.ndarray, last: numpy.ndarray) -> numpy.ndarray:
        """Members up to `last`, with the number of their pair in the upper half; ascending."""
        sizes = self.sizes[texts]
        pair = numpy.repeat(numpy.arange(len(texts), dtype=numpy.uint64), sizes)
        offset = numpy.arange(sizes.sum()) - numpy.repeat(numpy.cumsum(sizes) - sizes, sizes)
        members = self.members[numpy.repeat(self.starts[texts], sizes) + offset]
        return ((pair << HALF) | members)[members <= numpy.repeat(last, sizes)]


def _members(texts: list[list[int]]) -> tuple[numpy.ndarray, numpy.ndarray]:
    """The hashes of each text's words and word pairs, ascending and unique, and where they start.

    Every text must have a word.
    """
    sizes = numpy.array([len(words) for words in texts])
    words = numpy.fromiter((word for words in texts for word in words), numpy.uint64, sizes.sum())
    text = numpy.repeat(numpy.arange(len(texts), dtype=numpy.uint64), sizes)
    words = _mixed(words)
    pairs = _mixed(words[:-1] * ODD + words[1:])
    within = text[:-1] == text[1:]
    keys = numpy.concatenate([(text << HALF) | words, ((text[:-1] << HALF) | pairs)[within]])
    keys.sort()  # and no numpy.unique: its hash table is ten times slower on such numbers
    keys = keys[numpy.append(True, keys[1:] != keys[:-1])]
    starts = numpy.searchsorted(keys, numpy.arange(len(texts), dtype=numpy.uint64) << HALF)
    return keys.astype(numpy.uint32), starts


def _mixed(values: numpy.ndarray) -> numpy.ndarray:
    """32 well-mixed bits of each value, so that the smallest hashes are a random sample."""
    values = (values ^ (values >> HALF)) * PRIME
    return ((values ^ (values >> numpy.uint64(29))) * ODD) >> HALF


def _pairs_in_buckets(hashes: numpy.ndarray) -> Iterator[numpy.ndarray]:
    """`later * len(hashes) + earlier` of texts with equal hashes, each pair once."""
    order = numpy.argsort(hashes, kind="stable")
    in_order = hashes[order]
    is_first = numpy.append(True, in_order[1:] != in_order[:-1])
    start = numpy.maximum.accumulate(numpy.where(is_first, numpy.arange(len(order)), 0))
    is_far = numpy.arange(len(order)) - start > WINDOW
    yield (order * len(hashes) + order[start])[is_far]
    for distance in range(1, min(WINDOW, len(order) - 1) + 1):
        equal = numpy.flatnonzero(in_order[distance:] == in_order[:-distance])
        if not len(equal):
            break
        yield order[equal + distance] * len(hashes) + order[equal]


def _hopeful(bits: numpy.ndarray, pairs: numpy.ndarray, threshold: float) -> numpy.ndarray:
    """True for each pair that may reach the threshold: of unlike members half the bits differ."""
    hopeful = numpy.empty(len(pairs), bool)
    for start in range(0, len(pairs), BLOCK_PAIRS):
        block = slice(start, start + BLOCK_PAIRS)
        one, other = numpy.divmod(pairs[block], len(bits))
        differing = numpy.bitwise_count(bits[one] ^ bits[other]).sum(axis=1, dtype=numpy.int64)
        similarity = 1 - 2 * differing / (64 * bits.shape[1])
        hopeful[block] = similarity >= threshold - SLACK
    return hopeful


def _sorted(found: list[SimilarPairs]) -> SimilarPairs:
    earlier, later, similarity = (numpy.concatenate(column) for column in zip(*found, strict=True))
    order = numpy.lexsort((earlier, later))
    return SimilarPairs(earlier[order], later[order], similarity[order])


def _blocks(places: numpy.ndarray, sizes: numpy.ndarray) -> Iterator[numpy.ndarray]:
    """The places in runs whose sizes add up to about BLOCK_MEMBERS."""
    edges = numpy.flatnonzero(numpy.diff(numpy.cumsum(sizes) // BLOCK_MEMBERS)) + 1
    return iter(numpy.split(places, edges))


def _joined(blocks: list[numpy.ndarray], dtype: type) -> numpy.ndarray:
    return numpy.concatenate(blocks) if blocks else numpy.zeros(0, dtype)
