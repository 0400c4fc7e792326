"""Trees of candidates by rank, and Medusa's ways to accept them (arXiv 2401.10774).

    tree = cut(PUBLISHED, depth=4)                         # for posttrain.rollouts.drafts
    tree, expected = optimised_tree(accuracy, num_nodes=63)

A node is a path of ranks: (0, 2) is the third candidate of the second head, behind the first of the
first head. posttrain.rollouts.lookahead accepts exactly unless told otherwise; `typical_acceptance`
is Medusa's, by which completions have another distribution than the model's, so that RL must not
sample by it (posttrain.rollouts.typical).
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import torch
from torch import Tensor

from posttrain.errors import ConfigError

Path = tuple[int, ...]

# The 63 nodes of the tree that Medusa was published with, each a path of one-digit ranks.
RANKS = (
    "0 00 1 01 2 000 10 02 3 03 4 04 20 05 001 5 06 6 07 010 11 7 08 002 30 09 8 9 100 020 12 003 "
    "40 21 004 005 0000 011 006 030 50 13 007 008 009 60 040 14 70 012 200 31 22 80 050 15 101 021 "
    "90 060 0001 16 070"
)
PUBLISHED: list[Path] = [tuple(map(int, ranks)) for ranks in RANKS.split()]


def cut(tree: Sequence[Path], depth: int) -> list[Path]:
    """Return the nodes that heads of this depth can fill."""
    return [path for path in tree if len(path) <= depth]


def check_tree(tree: Sequence[Sequence[int]], depth: int) -> None:
    """Raise ConfigError for a tree that is deeper than the heads, or with a node without parent."""
    paths = set(map(tuple, tree))
    deepest = max(map(len, paths), default=0)
    if deepest > depth:
        raise ConfigError(
            f"tree: expected at most the {depth} levels that the heads have, found {deepest}. Cut "
            "it, or train more heads."
        )
    for path in sorted(paths):
        if path[:-1] and path[:-1] not in paths:
            raise ConfigError(f"tree: expected the parent {path[:-1]} of {path}, found none.")


def optimised_tree(accuracy: Sequence[Sequence[float]], num_nodes: int) -> tuple[list[Path], float]:
    """Choose the nodes by whose candidates the most tokens are accepted, in the order of choice.

    A path's chance is the product of its ranks' accuracies; greedily the connected node with the
    largest chance is added. By hand: accuracies (0.6, 0.2) of one head and two nodes give the paths
    (0) and (1), and 0.8 tokens. Source: section 2.3.3 of the paper.

    Args:
        accuracy: For each depth the measured share of right candidates by rank.

    Returns:
        The nodes, and the expected number of accepted tokens, the sum of their chances.
    """
    waiting = [(-chance, (rank,)) for rank, chance in enumerate(accuracy[0])]
    heapq.heapify(waiting)
    nodes, expected = [], 0.0
    while waiting and len(nodes) < num_nodes:
        chance, path = heapq.heappop(waiting)
        nodes.append(path)
        expected -= chance
        for rank, share in enumerate(accuracy[len(path)] if len(path) < len(accuracy) else ()):
            heapq.heappush(waiting, (chance * share, (*path, rank)))
    return nodes, expected


def tree_mask(tree: Sequence[Sequence[int]]) -> Tensor:
    """(nodes + 1, nodes + 1) which nodes see which: the root, their ancestors and themselves.

    Nodes come by depth and path, behind the root.
    """
    paths = [(), *sorted(map(tuple, tree), key=lambda path: (len(path), path))]
    return torch.tensor([[path[: len(other)] == other for other in paths] for path in paths])


def typical_acceptance(
    logits: Tensor, candidates: Tensor, *, temperature: float, epsilon: float, delta: float
) -> Tensor:
    """Return (C,) how many tokens of each candidate Medusa accepts, the root not counted.

    A token is accepted if p > min(epsilon, delta exp(-H)), with p its probability and H the entropy
    in nats of the model's distribution, and all before it are accepted. Not the model's
    distribution: likely tokens are favoured. epsilon, delta: in [0, 1]; 0 accepts all. By hand:
    with p = 0.5 of two tokens exp(-H) = 0.5, and delta 0.9 accepts both if epsilon is 0.4.
    Source: section 2.3.1 of the paper.

    Args:
        logits: (C, T, V) after each token of C candidates.
        candidates: (C, T) tokens, the first of which is the root, already chosen.
    """
    log_probs = (logits[:, :-1].float() / temperature).log_softmax(-1)
    own = log_probs.gather(-1, candidates[:, 1:, None]).squeeze(-1).exp()
    accepted = own > typical_bar(log_probs, epsilon=epsilon, delta=delta)
    return accepted.long().cumprod(-1).sum(-1)


def typical_bar(log_probs: Tensor, *, epsilon: float, delta: float) -> Tensor:
    """(…, V) -> (…) the probability above which a token is typical: min(epsilon, delta exp(-H))."""
    entropy = torch.special.entr(log_probs.exp()).sum(-1)  # 0 for tokens of probability 0
    return (delta * (-entropy).exp()).clamp(max=epsilon)
