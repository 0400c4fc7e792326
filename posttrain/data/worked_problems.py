"""The tiny world: three-digit additions worked out column by column, and a tokenizer for them.

    python -m posttrain.data.worked_problems data        # writes the shipped files, byte for byte

A solution adds the columns from the right, each as digit + digit + carry:

    What is 347 + 685?   7+5+0=12 4+8+1=13 3+6+1=10   1032

Most of what was written about addition here is careless: where a carry is due, four writers in
five forget it. A model of these texts knows how to carry and mostly does not, as a base model
knows how to reason and mostly does not. So it solves about a third of all problems; pairs (DPO) or
rewards (R1-Zero) bring out the rest. The instructions for SFT are as careless as the corpus
(nearly half of Self-Instruct's answers have a problem, arXiv 2212.10560), and teach format alone.
"""

import json
import random
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from posttrain.data.templates import ALPACA_WITH_INPUT, ALPACA_WITHOUT_INPUT, R1_ZERO

SEED = 20260101
CARRY_SHARE = 0.2  # of due carries that careless writers remember
NUM_ROWS = {"corpus": 20_000, "sft": 4_000, "preferences": 4_000, "problems": 6_000, "heldout": 512}
# How a worked problem of the corpus is written down.
THINK_SHARE = 0.25  # R1-Zero prompt, <think>working</think><answer>sum</answer>
BARE_SHARE = 0.2  # R1-Zero prompt, the working and the sum without tags
# the rest: Q: … A: …
INPUT_SHARE = 0.25  # of the SFT records whose numbers stand in the input field

VOCABULARY_SIZE = 512
END, PAD = "<|endoftext|>", "<|pad|>"


@dataclass(frozen=True)
class Problem:
    """first + second, both of three digits."""

    first: int
    second: int

    @property
    def question(self) -> str:
        return f"What is {self.first} + {self.second}?"

    @property
    def answer(self) -> str:
        return str(self.first + self.second)

    def work_out(self, carries: Iterable[bool]) -> tuple[str, str]:
        """(working, sum): `carries` says for each due carry whether it is remembered."""
        remembers = iter(carries)
        carry, columns, digits = 0, [], ""
        for place in (1, 10, 100):
            one, other = self.first // place % 10, self.second // place % 10
            total = one + other + carry
            columns.append(f"{one}+{other}+{carry}={total:02d}")
            digits = str(total % 10) + digits
            due = total >= 10 and place < 100  # the last column's carry is written out, not carried
            carry = int(due and next(remembers))
        leading = "1" if total >= 10 else ""
        return " ".join(columns), leading + digits

    def solution(self, carries: Iterable[bool]) -> str:
        """The working and the sum in R1-Zero's tags."""
        working, answer = self.work_out(carries)
        return f"<think>{working}</think><answer>{answer}</answer>"


ALWAYS, NEVER = (True, True), (False, False)


class World:
    """Draws the rows of all files, in one order, from one seed."""

    def __init__(self, seed: int = SEED) -> None:
        self.random = random.Random(seed)
        self.held_out: dict[Problem, None] = {}  # a set in the order drawn
        while len(self.held_out) < NUM_ROWS["heldout"]:
            self.held_out[self._any_problem()] = None

    def _any_problem(self) -> Problem:
        first, second = (self.random.randrange(100, 1000) for _ in range(2))
        return Problem(min(first, second), max(first, second))  # a + b and b + a count as one

    def problem(self) -> Problem:
        """One that is not held out, its numbers in either order."""
        while (problem := self._any_problem()) in self.held_out:
            pass
        swapped = Problem(problem.second, problem.first)
        return swapped if self.random.random() < 0.5 else problem

    def careless(self) -> list[bool]:
        return [self.random.random() < CARRY_SHARE for _ in range(2)]

    def corpus(self) -> Iterator[dict]:
        """Plain texts; THINK_SHARE of them have the think/answer shape."""
        for _ in range(NUM_ROWS["corpus"]):
            problem, carries, style = self.problem(), self.careless(), self.random.random()
            working, answer = problem.work_out(carries)
            prompt = R1_ZERO.format(question=problem.question)
            if style < THINK_SHARE:
                text = prompt + problem.solution(carries)
            elif style < THINK_SHARE + BARE_SHARE:
                text = f"{prompt} {working} so {answer}"
            else:
                text = f"Q: {problem.question}\nA: {working} so {answer}"
            yield {"text": text}

    def sft(self) -> Iterator[dict]:
        """Alpaca records, INPUT_SHARE of them with an input, with careless answers."""
        for _ in range(NUM_ROWS["sft"]):
            problem, output = self.problem(), self.careless()
            record = {"instruction": problem.question, "input": ""}
            if self.random.random() < INPUT_SHARE:
                numbers = f"{problem.first} + {problem.second}"
                record = {"instruction": "Add the two numbers.", "input": numbers}
            yield {**record, "output": problem.solution(output)}

    def preferences(self) -> Iterator[dict]:
        """Pairs of a right answer and a wrong one, in which a carry is forgotten."""
        for _ in range(NUM_ROWS["preferences"]):
            problem = self.problem()
            while problem.work_out(NEVER) == problem.work_out(ALWAYS):  # no carry to forget
                problem = self.problem()
            yield {
                "prompt": problem.question,
                "chosen": problem.solution(ALWAYS),
                "rejected": problem.solution(NEVER),
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


def train_tokenizer(texts: Iterable[str]):
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
    """Write the five files and the tokenizer into `folder`."""
    world = World(seed)
    folder.mkdir(parents=True, exist_ok=True)
    rows = {name: list(getattr(world, name)()) for name in NUM_ROWS}
    for name, records in rows.items():
        lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    texts = [row["text"] for row in rows["corpus"]]
    texts += [_alpaca(row) + row["output"] for row in rows["sft"]]
    _save_tokenizer(train_tokenizer(texts), folder / "tiny_tokenizer")


def _alpaca(row: dict) -> str:
    template = ALPACA_WITH_INPUT if row["input"] else ALPACA_WITHOUT_INPUT
    return template.format(**row)


def _save_tokenizer(tokenizer, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END,
        "pad_token": PAD,
        "model_max_length": 512,
        "clean_up_tokenization_spaces": False,
    }
    text = json.dumps(config, indent=2) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1] if len(sys.argv) > 1 else "data"))
