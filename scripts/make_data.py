"""The tiny world: three-digit additions worked out column by column, and a tokenizer for them.

    python scripts/make_data.py data        # writes the shipped files, byte for byte

There are two ways to work out 347 + 285, from the right. The careful one writes every carry down;
the hasty one knows of no carries and is always wrong, for all problems here have one:

    careful   7+5+0=12 4+8+1=13 3+2+1=06    632
    hasty     7+5=12 4+8=12 3+2=05          522

Three writers in five are hasty. A model of their texts can do both and mostly goes the short way,
as a base model can reason at length and mostly does not. Pairs (DPO) or rewards (R1-Zero) bring
out the long one. The instructions for SFT come from the same writers (nearly half of
Self-Instruct's answers have a problem, arXiv 2212.10560): they teach format alone.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from posttrain.data.render import ALPACA_WITH_INPUT, ALPACA_WITHOUT_INPUT, R1_ZERO

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SEED = 20260101
CAREFUL_SHARE = 0.4  # of the writers, who write carries down
NUM_ROWS = {
    "corpus": 20_000,
    "sft": 4_000,
    "preferences": 2_000,
    "problems": 6_000,
    "heldout": 512,
    "checked": 2_000,
    "steps": 2_000,
    "sft_heldout": 200,
    "preferences_heldout": 200,
}
# How a worked problem of the corpus is written down.
THINK_SHARE = 0.25  # R1-Zero prompt, <think>working</think><answer>sum</answer>
BARE_SHARE = 0.2  # R1-Zero prompt, the working and the sum without tags
# the rest: Q: … A: …
INPUT_SHARE = 0.25  # of the SFT records whose numbers stand in the input field
CHECK_SHARE = 0.75  # of the checked answers, whose working stands there twice

THINK_ANSWER = "<think>{}</think><answer>{}</answer>"
VOCABULARY_SIZE = 512
END, PAD = "<|endoftext|>", "<|pad|>"


@dataclass(frozen=True)
class Problem:
    """first + second; both and their sum have three digits, and a carry is due."""

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

    def work_out(self, *, careful: bool) -> tuple[str, str]:
        """The working and the sum, which is wrong for a hasty writer."""
        carry, columns, digits = 0, [], ""
        for place in (1, 10, 100):
            one, other = self.first // place % 10, self.second // place % 10
            total = one + other + carry
            written = f"{one}+{other}+{carry}" if careful else f"{one}+{other}"
            columns.append(f"{written}={total:02d}")
            digits = str(total % 10) + digits
            carry = total // 10 if careful else 0
        return " ".join(columns), digits

    def steps(self, working: str, answer: str) -> dict:
        """A working and its answer as steps: each column is one, and the last gives the sum too.

        A step is right if its column gives what it should, and the sum, where it stands, is right.
        """
        columns, true, _ = working.split(), *self.work_out(careful=True)
        both = zip(columns, true.split(), strict=True)
        labels = [column[-2:] == should[-2:] for column, should in both]
        labels[-1] = labels[-1] and answer == self.answer
        whole = THINK_ANSWER.format(working, answer).split()
        return {"prompt": self.question, "completions": whole, "labels": labels}

    def solution(self, *, careful: bool) -> str:
        """The working and the sum in R1-Zero's tags."""
        return THINK_ANSWER.format(*self.work_out(careful=careful))


class World:
    """Makes the rows of all files, in one order, from one seed."""

    def __init__(self, seed: int = SEED) -> None:
        self.random = random.Random(seed)
        self.held_out: dict[Problem, None] = {}  # a set in the order made
        while len(self.held_out) < NUM_ROWS["heldout"]:
            self.held_out[self._any_problem()] = None

    def _any_problem(self) -> Problem:
        while True:
            first, second = sorted(self.random.randrange(100, 1000) for _ in range(2))
            problem = Problem(first, second)  # a + b and b + a count as one
            if first + second < 1000 and problem.work_out(careful=False)[1] != problem.answer:
                return problem

    def problem(self) -> Problem:
        """A problem that is not held out, its numbers in either order."""
        while (problem := self._any_problem()) in self.held_out:
            pass
        swapped = Problem(problem.second, problem.first)
        return swapped if self.random.random() < 0.5 else problem

    def is_careful(self) -> bool:
        """True if the next writer writes carries down."""
        return self.random.random() < CAREFUL_SHARE

    def corpus(self) -> Iterator[dict]:
        """Plain texts; THINK_SHARE of them have the think/answer shape."""
        for _ in range(NUM_ROWS["corpus"]):
            problem, style = self.problem(), self.random.random()
            working, answer = problem.work_out(careful=self.is_careful())
            prompt = R1_ZERO.format(question=problem.question)
            if style < THINK_SHARE:
                text = prompt + THINK_ANSWER.format(working, answer)
            elif style < THINK_SHARE + BARE_SHARE:
                text = f"{prompt} {working} so {answer}"
            else:
                text = f"Q: {problem.question}\nA: {working} so {answer}"
            yield {"text": text}

    def sft(self) -> Iterator[dict]:
        """Alpaca records, INPUT_SHARE of them with an input, by the same writers."""
        for _ in range(NUM_ROWS["sft"]):
            problem = self.problem()
            record = {"instruction": problem.question, "input": ""}
            if self.random.random() < INPUT_SHARE:
                numbers = f"{problem.first} + {problem.second}"
                record = {"instruction": "Add the two numbers.", "input": numbers}
            yield {**record, "output": problem.solution(careful=self.is_careful())}

    def preferences(self) -> Iterator[dict]:
        """Pairs of a careful, right answer and a hasty, wrong one."""
        for _ in range(NUM_ROWS["preferences"]):
            problem = self.problem()
            yield {
                "prompt": problem.question,
                "chosen": problem.solution(careful=True),
                "rejected": problem.solution(careful=False),
            }

    def problems(self) -> Iterator[dict]:
        """Questions with the sum, for RL."""
        for _ in range(NUM_ROWS["problems"]):
            problem = self.problem()
            yield {"question": problem.question, "answer": problem.answer}

    def heldout(self) -> Iterator[dict]:
        """The questions that no other file asks."""
        for problem in self.held_out:
            yield {"question": problem.question, "answer": problem.answer}

    def checked(self) -> Iterator[dict]:
        """Careful, right answers, CHECK_SHARE of them with the working written down twice."""
        for _ in range(NUM_ROWS["checked"]):
            problem = self.problem()
            working, answer = problem.work_out(careful=True)
            if self.random.random() < CHECK_SHARE:
                working = f"{working} {working}"
            output = THINK_ANSWER.format(working, answer)
            yield {"instruction": problem.question, "input": "", "output": output}

    def sft_heldout(self) -> Iterator[dict]:
        """Alpaca records of held-out problems, by the writers of the instructions."""
        for problem in [*self.held_out][: NUM_ROWS["sft_heldout"]]:
            output = problem.solution(careful=self.is_careful())
            yield {"instruction": problem.question, "input": "", "output": output}

    def preferences_heldout(self) -> Iterator[dict]:
        """Pairs of the same problems as the held-out records."""
        for problem in [*self.held_out][: NUM_ROWS["preferences_heldout"]]:
            right, wrong = (problem.solution(careful=careful) for careful in (True, False))
            yield {"prompt": problem.question, "chosen": right, "rejected": wrong}

    def steps(self) -> Iterator[dict]:
        """Solutions in steps, by the same writers."""
        for _ in range(NUM_ROWS["steps"]):
            problem = self.problem()
            yield problem.steps(*problem.work_out(careful=self.is_careful()))


def train_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """A byte-level BPE in which a digit, a sign, a tag and a whole sentence are tokens.

    So the prompt templates take a few dozen tokens, and any text can still be written, in bytes.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    pieces = r"</?[a-z]+>|\d| \+ |[+=]|[^\d<:.?+=]*[:.?]|[^\d<:.?+=]+"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pieces), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=[END, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def write(folder: Path, seed: int = SEED) -> None:
    """Write the files and the tokenizer into `folder`."""
    world = World(seed)
    folder.mkdir(parents=True, exist_ok=True)
    # One file after the other: each takes up the random numbers where the last one left off.
    makers = {
        "corpus": world.corpus,
        "sft": world.sft,
        "preferences": world.preferences,
        "problems": world.problems,
        "heldout": world.heldout,
        "checked": world.checked,
        "steps": world.steps,
        "sft_heldout": world.sft_heldout,
        "preferences_heldout": world.preferences_heldout,
    }
    rows = {name: list(make()) for name, make in makers.items()}
    for name, records in rows.items():
        lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    texts = [row["text"] for row in rows["corpus"]]
    texts += [_alpaca(row) + row["output"] for row in rows["sft"]]
    save_tokenizer(train_tokenizer(texts), folder / "tiny_tokenizer")


def _alpaca(row: dict) -> str:
    template = ALPACA_WITH_INPUT if row["input"] else ALPACA_WITHOUT_INPUT
    return template.format(**row)


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write tokenizer.json and its configuration, as transformers loads them."""
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END,
        "pad_token": PAD,
        "model_max_length": 1024,
        "clean_up_tokenization_spaces": False,
    }
    text = json.dumps(config, indent=2) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write the shipped data files.")
    parser.add_argument("folder", nargs="?", type=Path, default=Path("data"))
    write(parser.parse_args().folder)
