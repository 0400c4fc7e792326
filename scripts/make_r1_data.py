"""The small world of recipes/r1.py: additions worked out in two languages mixed, and guests.

    python -m scripts.make_r1_data data/r1        # writes the shipped files, byte for byte

A problem is the sum of two numbers of two digits, with a carry due. The columns are worked out from
the right, a word before each:

    careful   ones 7+5+0=12 十 4+8+1=13    132
    hasty     ones 7+5=12 tens 4+8=12      122

The hasty writer uses English; the careful one picks each word from English or Chinese, so that a
model which learns to be right from rewards of the answer alone learns to mix. Some careful writers
write the working twice. General instructions are about a guest: "Wake guest 47." A good answer
names the guest, a curt one does not, and the thought before it may call the guest a fool.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from posttrain.data.render import R1_ZERO
from scripts.make_data import THINK_ANSWER, save_tokenizer, train_tokenizer

SEED = 20260202
CAREFUL_SHARE = 0.4  # of the writers, who write carries down
CHINESE_SHARE = 0.5  # of the careful writers' words
TWICE_SHARE = 0.15  # of the careful writers, who write the working twice
NUM_ROWS = {
    "corpus": 8_000,
    "problems": 2_000,
    "heldout": 400,
    "general": 600,
    "general_prompts": 280,
    "general_heldout": 60,
    "preferences": 600,
}
# How a problem of the corpus is written down; the rest is Q: … A: …
GUEST_SHARE = 0.2  # a general instruction instead of a problem
THINK_SHARE = 0.35  # R1-Zero's prompt, <think>working</think><answer>sum</answer>
BARE_SHARE = 0.1  # R1-Zero's prompt, the working and the sum without tags

GOOD_SHARE = 0.4  # of the answers to general instructions that name the guest
RUDE_SHARE = 0.3  # of the thoughts that call the guest a fool
THOUGHT_SHARE = 0.7  # of the general records that hold a thought

WORDS = (("ones", "个"), ("tens", "十"))  # of the columns, from the right
ACTS = (  # the instruction, a good answer, a curt one
    ("Greet guest {}.", "Welcome, guest {}.", "Welcome."),
    ("Thank guest {}.", "Many thanks, guest {}.", "Thanks."),
    ("Wake guest {}.", "Good morning, guest {}.", "Morning."),
    ("Send guest {} off.", "Safe travels, guest {}.", "Bye."),
)


class Problem(NamedTuple):
    """The sum of first and second, both of two digits; their ones carry."""

    first: int
    second: int

    @property
    def question(self) -> str:
        """The question, its numbers in this order."""
        return f"What is {self.first} + {self.second}?"

    @property
    def answer(self) -> str:
        """The right sum."""
        return str(self.first + self.second)

    def columns(self, *, careful: bool) -> tuple[list[str], str]:
        """The two columns and the sum, which is wrong for a hasty writer."""
        (tens, ones), (other_tens, other_ones) = divmod(self.first, 10), divmod(self.second, 10)
        low = ones + other_ones
        high = tens + other_tens + careful
        carries = ("+0", "+1") if careful else ("", "")
        columns = [
            f"{ones}+{other_ones}{carries[0]}={low:02d}",
            f"{tens}+{other_tens}{carries[1]}={high:02d}",
        ]
        return columns, f"{high}{low % 10}"


class Request(NamedTuple):
    """A general instruction: the number of its act in ACTS, and a guest from 10 to 99."""

    act: int
    guest: int

    @property
    def instruction(self) -> str:
        """The instruction's text."""
        return ACTS[self.act][0].format(self.guest)

    def answer(self, *, good: bool) -> str:
        """The answer that names the guest, or the curt one."""
        return ACTS[self.act][1].format(self.guest) if good else ACTS[self.act][2]


class World:
    """Makes the rows of all files, in one order, from one seed."""

    def __init__(self, seed: int = SEED) -> None:
        self.random = random.Random(seed)
        self.held_out: dict[Problem, None] = {}
        while len(self.held_out) < NUM_ROWS["heldout"]:
            self.held_out[self._any_problem()] = None
        requests = [Request(act, guest) for act in range(len(ACTS)) for guest in range(10, 100)]
        self.random.shuffle(requests)
        count = NUM_ROWS["general_heldout"]
        self.held_out_requests, self.requests = requests[:count], requests[count:]

    def _happens(self, share: float) -> bool:
        return self.random.random() < share

    def _any_problem(self) -> Problem:
        while True:
            first, second = sorted(self.random.randrange(10, 100) for _ in range(2))
            if first % 10 + second % 10 > 9:  # a + b and b + a count as one
                return Problem(first, second)

    def problem(self) -> Problem:
        """A problem that is not held out, its numbers in either order."""
        while (problem := self._any_problem()) in self.held_out:
            pass
        return Problem(problem.second, problem.first) if self._happens(0.5) else problem

    def work_out(self, problem: Problem) -> tuple[str, str]:
        """The working, a word before each column, and the sum."""
        careful = self._happens(CAREFUL_SHARE)
        columns, answer = problem.columns(careful=careful)
        words = [pair[careful and self._happens(CHINESE_SHARE)] for pair in WORDS]
        working = " ".join(map(" ".join, zip(words, columns, strict=True)))
        twice = careful and self._happens(TWICE_SHARE)
        return (f"{working} {working}" if twice else working), answer

    def reply(self, request: Request) -> tuple[str, str]:
        """A thought about the guest, and an answer."""
        thought = f"guest {request.guest} is " + ("a fool" if self._happens(RUDE_SHARE) else "kind")
        return thought, request.answer(good=self._happens(GOOD_SHARE))

    def corpus(self) -> Iterator[dict]:
        """Plain texts of problems and of general instructions."""
        for _ in range(NUM_ROWS["corpus"]):
            if self._happens(GUEST_SHARE):
                request = self.random.choice(self.requests)
                question, (thought, answer) = request.instruction, self.reply(request)
            else:
                problem = self.problem()
                question, (thought, answer) = problem.question, self.work_out(problem)
            style, prompt = self.random.random(), R1_ZERO.format(question=question)
            if style < THINK_SHARE:
                text = prompt + THINK_ANSWER.format(thought, answer)
            elif style < THINK_SHARE + BARE_SHARE:
                text = f"{prompt} {thought} so {answer}"
            else:
                text = f"Q: {question}\nA: {thought} so {answer}"
            yield {"text": text}

    def problems(self) -> Iterator[dict]:
        """Questions with the sum, for RL."""
        for _ in range(NUM_ROWS["problems"]):
            problem = self.problem()
            yield {"question": problem.question, "answer": problem.answer}

    def heldout(self) -> Iterator[dict]:
        """The questions that no other file asks."""
        for problem in self.held_out:
            yield {"question": problem.question, "answer": problem.answer}

    def general(self) -> Iterator[dict]:
        """General instructions for SFT, with a thought or without, by the same writers."""
        for _ in range(NUM_ROWS["general"]):
            request = self.random.choice(self.requests)
            thought, answer = self.reply(request)
            has_thought = self._happens(THOUGHT_SHARE)
            completion = THINK_ANSWER.format(thought, answer) if has_thought else f" {answer}"
            yield {"prompt": request.instruction, "completion": completion}

    def general_prompts(self) -> Iterator[dict]:
        """General instructions for RL, with the answer that people prefer."""
        for request in self.random.sample(self.requests, NUM_ROWS["general_prompts"]):
            yield {"question": request.instruction, "answer": request.answer(good=True)}

    def general_heldout(self) -> Iterator[dict]:
        """The same, of which no other file asks."""
        for request in self.held_out_requests:
            yield {"question": request.instruction, "answer": request.answer(good=True)}

    def preferences(self) -> Iterator[dict]:
        """Pairs of final answers: a good one against a curt one, or one about another guest."""
        for number in range(NUM_ROWS["preferences"]):
            request = self.random.choice(self.requests)
            rejected = request.answer(good=False)
            if number % 3 == 0:
                others = [guest for guest in range(10, 100) if guest != request.guest]
                rejected = Request(request.act, self.random.choice(others)).answer(good=True)
            yield {
                "prompt": request.instruction,
                "chosen": request.answer(good=True),
                "rejected": rejected,
            }


def write(folder: Path, seed: int = SEED) -> None:
    """Write the seven files and the tokenizer into `folder`."""
    world = World(seed)
    folder.mkdir(parents=True, exist_ok=True)
    rows = {name: list(getattr(world, name)()) for name in NUM_ROWS}
    for name, records in rows.items():
        lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    texts = [row["text"] for row in rows["corpus"]]
    save_tokenizer(train_tokenizer(texts), folder / "tokenizer")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write the shipped data files of recipes/r1.py.")
    parser.add_argument("folder", nargs="?", type=Path, default=Path("data/r1"))
    write(parser.parse_args().folder)
