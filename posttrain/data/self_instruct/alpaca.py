"""Alpaca's way: whole tasks, 20 a request, of which 3 are seeds shown and 17 are to be written.

Only seeds are shown, never what was made, so requests do not depend on answers. One instance an
instruction; no split by type. github.com/tatsu-lab/stanford_alpaca, generate_instruction.py.
"""

import random
from collections.abc import Sequence

from posttrain.data.self_instruct.collecting import Collection
from posttrain.data.self_instruct.exchange import Answer, Request
from posttrain.data.self_instruct.filters import ALPACA_BLACKLIST, Rejected, check_instance
from posttrain.data.self_instruct.parsing import Item, parse_tasks
from posttrain.data.self_instruct.prompts import tasks_prompt
from posttrain.data.self_instruct.tasks import Task

NUM_TASKS, NUM_SHOWN = 20, 3
MAX_TOKENS = 3072
MAX_BARREN_REQUESTS = 20  # in a row without a record: this teacher will not bring any


class Alpaca:
    """Requests until `num_records` are kept; `made` holds what came of them.

    temperature: None is Alpaca's, 1. After the run `stopped` says why it ended early, if it did.
    """

    blacklist = ALPACA_BLACKLIST

    def __init__(
        self,
        seeds: Sequence[Task],
        *,
        num_records: int,
        seed: int = 0,
        temperature: float | None = None,
    ) -> None:
        self.seeds, self.num_records, self.seed = seeds, num_records, seed
        self.temperature = 1.0 if temperature is None else temperature
        self.made = Collection(seeds, blacklist=self.blacklist)
        self.stopped = ""
        self._num_asked = 0
        self._num_barren = 0

    def next_request(self) -> Request | None:
        """The next one, or None when there are records enough."""
        if len(self.made.records) >= self.num_records or self.stopped:
            return None
        name = f"tasks-{self._num_asked:05d}"
        self._num_asked += 1
        shown = random.Random(f"{self.seed} {name}").sample(list(self.seeds), NUM_SHOWN)
        return Request(
            name,
            tasks_prompt(shown, total=NUM_TASKS),
            MAX_TOKENS,
            temperature=self.temperature,
            stop=(f"\n{NUM_TASKS + 1}. ",),
            seed=self.seed,
        )

    def take(self, request: Request, answer: Answer) -> None:
        """Keep what passes the filters, in the order in which it was written."""
        if answer.finish_reason == "failed":
            return
        before = len(self.made.records)
        for item in parse_tasks(answer.text, is_cut=answer.finish_reason == "length"):
            self._offer(item, request.name)
        self._num_barren = 0 if len(self.made.records) > before else self._num_barren + 1
        if self._num_barren == MAX_BARREN_REQUESTS:
            self.stopped = f"{MAX_BARREN_REQUESTS} answers in a row brought no record"

    def _offer(self, item: Item, source: str) -> None:
        task = item.found
        try:
            if isinstance(task, Rejected):
                raise task
            self.made.check_new_instruction(task.instruction)
            check_instance(task.input, task.output)
        except Rejected as rejected:
            self.made.reject(rejected, source, text=item.text)
            return
        self.made.pool.add(task.instruction)
        self.made.records.append(task)
