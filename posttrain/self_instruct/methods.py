"""The two methods: which requests they make, and what they keep of the answers.

    method = Alpaca(seeds, num_records=100)
    while request := method.next_request():
        method.take(request, answer)
    method.made.records, method.made.rejected

Alpaca asks for whole tasks, 20 a request, of which 3 are seeds shown and 17 are to be written. Only
seeds are shown, never what was made, so requests do not depend on answers. There is one instance
per instruction, and no split by type (github.com/tatsu-lab/stanford_alpaca).

Self-Instruct asks for instructions, then for the type of each, then for instances of it. Eight
instructions are shown, up to two of them made by the teacher itself, so that the pool feeds on what
it has found. Classifications are made label first, else all inputs come out with the same label.
arXiv 2212.10560, sections 2.2 and 3.1; github.com/yizhongw/self-instruct.

    instructions-00000 -> new instructions -> type-00000, type-00001, … -> instances-00000, …

What waits for its type or its instances is asked before new instructions are, so that a budget
that ends leaves records, not half of everything.
"""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from posttrain.errors import DataError
from posttrain.self_instruct.filters import (
    ALPACA_BLACKLIST,
    SELF_INSTRUCT_BLACKLIST,
    Rejected,
    check_contradiction,
    check_instance,
    check_instruction,
)
from posttrain.self_instruct.parsing import (
    Item,
    parse_instances,
    parse_instructions,
    parse_tasks,
    parse_type,
)
from posttrain.self_instruct.prompts import (
    instances_prompt,
    instructions_prompt,
    tasks_prompt,
    type_prompt,
)
from posttrain.self_instruct.rouge import NoveltyPool
from posttrain.self_instruct.tasks import Task
from posttrain.self_instruct.teacher import Answer, Request

MAX_BARREN_REQUESTS = 20  # in a row without a new record: this teacher will not bring any

# Alpaca's.
NUM_TASKS, NUM_SEEDS_SHOWN = 20, 3
MAX_TOKENS = 3072

# Self-Instruct's.
NUM_SHOWN, NUM_SHOWN_FROM_POOL, LAST_NUMBER = 8, 2, 15
MAX_INSTANCES = 5
NUM_TYPE_EXAMPLES = 12  # half of them classifications
NUM_INSTANCE_EXAMPLES = 4

Take = Callable[[Answer], None]


@dataclass(frozen=True)
class RejectedText:
    """A text that was not kept: its reason, and the name of the request that it came from."""

    reason: str
    detail: str
    source: str
    text: str


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
        self.rejected: list[RejectedText] = []
        self.pool = NoveltyPool((seed.instruction for seed in seeds), threshold=threshold)

    def check_new_instruction(self, instruction: str) -> None:
        """Raise Rejected for an instruction that breaks a rule or is not new."""
        check_instruction(instruction, self.blacklist)
        similar = self.pool.too_similar(instruction)
        if similar is not None:
            raise Rejected("too similar", f"ROUGE-L {similar.score:.3f} to: {similar.text}")

    def reject(self, rejected: Rejected, source: str, text: str) -> None:
        """Note a text that was rejected. source: the request that it came from."""
        self.rejected.append(RejectedText(rejected.reason, rejected.detail, source, text))

    def count_rejected(self) -> Counter[str]:
        """Number of rejected texts by reason."""
        return Counter(each.reason for each in self.rejected)


class Method(Protocol):
    """A way to make records: it says what to ask next, and takes the answers.

    num_records: at which no more is asked. made: what came of the answers. stopped: why it ended
    early, empty if it did not.
    """

    num_records: int
    made: Collection
    stopped: str

    def next_request(self) -> Request | None:
        """The next request; None when nothing is to be asked until another answer was taken."""
        ...

    def take(self, request: Request, answer: Answer) -> None:
        """Keep or reject what the answer holds."""
        ...


class Alpaca:
    """Stanford Alpaca's method: asks for whole tasks until `num_records` are kept.

    temperature: None is Alpaca's, 1.
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
        """The next request; None when there are enough records."""
        if len(self.made.records) >= self.num_records or self.stopped:
            return None
        name = f"tasks-{self._num_asked:05d}"
        self._num_asked += 1
        shown = random.Random(f"{self.seed} {name}").sample(list(self.seeds), NUM_SEEDS_SHOWN)
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
        try:
            task = item.accepted()
            self.made.check_new_instruction(task.instruction)
            check_instance(task.input, task.output)
        except Rejected as rejected:
            self.made.reject(rejected, source, item.text)
            return
        self.made.pool.add(task.instruction)
        self.made.records.append(task)


class SelfInstruct:
    """Self-Instruct's method: asks until `num_records` instances are kept or on the way.

    temperature: that of the instructions; None is the paper's 0.7. Types and instances are greedy.
    """

    blacklist = SELF_INSTRUCT_BLACKLIST

    def __init__(
        self,
        seeds: Sequence[Task],
        *,
        num_records: int,
        seed: int = 0,
        temperature: float | None = None,
    ) -> None:
        self.seeds, self.num_records, self.seed = seeds, num_records, seed
        self.temperature = 0.7 if temperature is None else temperature
        self.made = Collection(seeds, blacklist=self.blacklist)
        self.stopped = ""
        self._instructions: list[str] = []  # the pool of the teacher's own
        self._num_open = 0  # instructions that have no records yet and may get some
        self._num_barren = 0
        self._waiting: deque[tuple[Request, Take]] = deque()
        self._under_way: dict[str, Take] = {}
        self._counts = {"instructions": 0, "type": 0, "instances": 0}
        self._examples = {kind: _of_type(seeds, kind) for kind in (True, False)}

    def next_request(self) -> Request | None:
        """The request that waits longest, else one for new instructions, else None for now."""
        if not self._waiting:
            on_the_way = len(self.made.records) + self._num_open
            if on_the_way >= self.num_records or self.stopped:
                return None
            self._ask_for_instructions()
        request, take = self._waiting.popleft()
        self._under_way[request.name] = take
        return request

    def take(self, request: Request, answer: Answer) -> None:
        """Pass the answer on to the stage that made the request."""
        self._under_way.pop(request.name)(answer)

    def _ask_for_instructions(self) -> None:
        name = self._name("instructions")
        chooser = random.Random(f"{self.seed} {name}")
        own = min(NUM_SHOWN_FROM_POOL, len(self._instructions))
        shown = chooser.sample(self._instructions, own)
        shown += [task.instruction for task in chooser.sample(list(self.seeds), NUM_SHOWN - own)]
        chooser.shuffle(shown)
        request = Request(
            name,
            instructions_prompt(shown, total=LAST_NUMBER),
            max_tokens=1024,
            temperature=self.temperature,
            top_p=0.5,
            presence_penalty=2.0,
            stop=(f"\n{LAST_NUMBER + 1}.",),
            seed=self.seed,
        )
        self._waiting.append((request, lambda answer: self._take_instructions(name, answer)))

    def _take_instructions(self, name: str, answer: Answer) -> None:
        before = len(self._instructions)
        is_cut = answer.finish_reason == "length"
        failed = answer.finish_reason == "failed"
        for item in [] if failed else parse_instructions(answer.text, is_cut=is_cut):
            try:
                instruction = item.accepted()
                self.made.check_new_instruction(instruction)
            except Rejected as rejected:
                self.made.reject(rejected, name, item.text)
                continue
            self.made.pool.add(instruction)
            self._instructions.append(instruction)
            self._ask_type(instruction)
        self._num_barren = 0 if len(self._instructions) > before else self._num_barren + 1
        if self._num_barren == MAX_BARREN_REQUESTS:
            self.stopped = f"{MAX_BARREN_REQUESTS} answers in a row brought no new instruction"

    def _ask_type(self, instruction: str) -> None:
        self._num_open += 1
        half = NUM_TYPE_EXAMPLES // 2
        pairs = zip(self._examples[True][:half], self._examples[False][:half], strict=False)
        examples = [task for pair in pairs for task in pair]
        name = self._name("type")
        # 16 tokens: a chat model may say "Yes, it is." Only the first word is read.
        request = Request(
            name, type_prompt(instruction, examples), max_tokens=16, temperature=0.0, stop=("\n",)
        )
        self._waiting.append((request, lambda answer: self._take_type(name, instruction, answer)))

    def _take_type(self, name: str, instruction: str, answer: Answer) -> None:
        try:
            if answer.finish_reason == "failed":
                raise Rejected("type unclear", answer.problem)
            self._ask_instances(instruction, parse_type(answer.text))
        except Rejected as rejected:
            self._num_open -= 1
            self.made.reject(rejected, name, instruction)

    def _ask_instances(self, instruction: str, is_classification: bool) -> None:
        name = self._name("instances")
        prompt = instances_prompt(
            instruction,
            self._examples[is_classification][:NUM_INSTANCE_EXAMPLES],
            is_classification=is_classification,
            most=MAX_INSTANCES,
        )
        request = Request(
            name,
            prompt,
            max_tokens=300 if is_classification else 350,
            temperature=0.0,
            presence_penalty=1.5,
            stop=(f"Example {MAX_INSTANCES + 1}", "Task:"),
        )
        self._waiting.append(
            (request, lambda a: self._take_instances(name, instruction, is_classification, a))
        )

    def _take_instances(
        self, name: str, instruction: str, is_classification: bool, answer: Answer
    ) -> None:
        self._num_open -= 1
        if answer.finish_reason == "failed":
            self.made.reject(Rejected("no output", answer.problem), name, instruction)
            return
        is_cut = answer.finish_reason == "length"
        kept: dict[tuple[str, str], None] = {}  # a set in the order written
        for item in parse_instances(
            answer.text, is_classification=is_classification, is_cut=is_cut
        ):
            try:
                kept[_new_instance(item, kept)] = None
            except Rejected as rejected:
                self.made.reject(rejected, name, f"{instruction}\n{item.text}")
        try:
            check_contradiction(list(kept))
        except Rejected as rejected:
            for paired_input, output in kept:
                text = f"{instruction}\nInput: {paired_input}\nOutput: {output}"
                self.made.reject(rejected, name, text)
            return
        self.made.records += [Task(instruction, *pair, is_classification) for pair in kept]

    def _name(self, stage: str) -> str:
        number = self._counts[stage]
        self._counts[stage] += 1
        return f"{stage}-{number:05d}"


def _new_instance(item: Item, kept: Container[tuple[str, str]]) -> tuple[str, str]:
    """(input, output) of an item; Rejected if it is none, breaks a rule or is kept already."""
    task = item.accepted()
    instance = (task.input, task.output)
    check_instance(*instance)
    if instance in kept:
        raise Rejected("repeated instance")
    return instance


def _of_type(seeds: Sequence[Task], is_classification: bool) -> list[Task]:
    found = [task for task in seeds if task.is_classification == is_classification]
    if not found:
        kind = "a classification" if is_classification else "no classification"
        raise DataError(
            f"seed tasks: expected some with is_classification {str(is_classification).lower()}, "
            f"found none. Self-Instruct shows the teacher what is {kind}."
        )
    return found
