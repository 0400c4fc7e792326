"""Where tasks end up: among the records, or among the rejected with a reason."""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from posttrain.data.rouge import NoveltyPool
from posttrain.data.self_instruct.filters import Rejected, check_instruction
from posttrain.data.self_instruct.tasks import Task


class Collection:
    """Records that were kept, everything that was not, and the pool of known instructions.

    blacklist: words that no instruction may have. threshold: ROUGE-L F1 above which an
    instruction is too similar to a seed or to one that was kept.
    """

    def __init__(
        self, seeds: Iterable[Task], *, blacklist: Sequence[str], threshold: float = 0.7
    ) -> None:
        self.blacklist = blacklist
        self.records: list[Task] = []
        self.rejected: list[dict[str, Any]] = []
        self.pool = NoveltyPool((seed.instruction for seed in seeds), threshold=threshold)

    def check_new_instruction(self, instruction: str) -> None:
        """Raises Rejected for an instruction that breaks a rule or is not new."""
        check_instruction(instruction, self.blacklist)
        similar = self.pool.too_similar(instruction)
        if similar is not None:
            raise Rejected("too similar", f"ROUGE-L {similar.score:.3f} to: {similar.text}")

    def reject(self, rejected: Rejected, source: str, **texts: Any) -> None:
        """Note what was rejected: its reason, the request it came from, and its texts."""
        row = {"reason": rejected.reason, "detail": rejected.detail, "source": source, **texts}
        self.rejected.append(row)

    def count_rejected(self) -> Counter[str]:
        return Counter(row["reason"] for row in self.rejected)
