"""Every causal family of transformers on our path: packed, by rows or refused, and how exact.

    python -m benchmarks.models                               # a few minutes; prints a table
    python -m benchmarks.models --only qwen3_5_text gpt_oss   # some of them
    python -m benchmarks.models --output docs/families.csv

For each family a tiny random model (benchmarks.families), in float32: three documents, and a prompt
with two answers, through `packed_logps`, against each sequence alone through the model as
transformers made it; relative 2-norms of log-probs and of all gradients. Windows, chunks and top-k
are 16 tokens, the sequences reach 48. Then 20 greedy tokens of two prompts against forwards of the
whole sequence, and the log-probs of sampled ones against a training forward.
"""

from __future__ import annotations

import contextlib
import csv
import inspect
import io
import re
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.families import VARIANTS, families, tiny_model
from posttrain.errors import ConfigError
from posttrain.packed.batch import Segment, pack, pack_groups
from posttrain.packed.forward import packed_logps
from posttrain.packed.prepare import prepare
from posttrain.rollouts.generator import HFGenerator, way_to_generate
from posttrain.rollouts.sampling import Sampling
from posttrain.run.options import option, parse, plain_errors, say

EXACT, EXACT_GENERATION = 1e-5, 1e-3  # relative; nats
GREEDY_TOKENS = 20
STOP = 1


@dataclass(frozen=True)
class Verdict:
    """What a family came to.

    how: packed, rows, refused, inexact, crash or not built. logps, gradients: relative differences.
    generation: loop, cache or no cache. sampled: nats by which log-probs of sampled tokens differ.
    greedy: whether greedy tokens are those of forwards of the whole sequence.
    """

    name: str
    how: str
    reason: str = ""
    logps: float = 0.0
    gradients: float = 0.0
    generation: str = ""
    sampled: float = 0.0
    greedy: bool = True
    seconds: float = 0.0


@dataclass(kw_only=True)
class Config:
    """Settings of the census."""

    only: list[str] = option([], "families or variants; none: all of them")
    output: str | None = option(None, "a CSV file for the table")


def judge(name: str) -> Verdict:
    """Build a family, or a variant of one, and measure it."""
    start = time.perf_counter()
    family, changes = VARIANTS.get(name, (name, {}))
    try:
        plain, model = (tiny_model(family, **changes) for _ in range(2))
    except Exception as error:
        return Verdict(name, "not built", _first_line(error))
    try:
        with contextlib.redirect_stdout(io.StringIO()) as said:
            kernel = prepare(model)
        found = _measure(plain, model)
    except ConfigError as error:
        return Verdict(name, "refused", str(error))
    except Exception as error:
        return Verdict(name, "crash", f"{type(error).__name__}: {_first_line(error)}")
    how = "rows" if kernel == "rows" else "packed"
    is_exact = max(found["logps"], found["gradients"]) <= EXACT and found["greedy"]
    if not is_exact or found["sampled"] > EXACT_GENERATION:
        how = "inexact"
    reason = said.getvalue().partition("included: ")[2].strip() if how == "rows" else ""
    if how == "packed":
        mixed = re.findall(r"mixers +\d+ layers (run by rows|hand).*: (.*)", said.getvalue())
        words = {"run by rows": "by rows", "hand": "by its state"}
        reason = "; ".join(f"{words[way]}: {kinds}" for way, kinds in mixed)
    return Verdict(name, how, reason, seconds=time.perf_counter() - start, **found)


def _fails_by_itself(plain: nn.Module) -> bool:
    """True if the model as it came cannot take a sequence of some length, in this size."""
    try:
        with torch.no_grad():
            for length in range(2, 50):
                _logits(plain, _ids(length))
    except Exception:
        return True
    return False


def _measure(plain: nn.Module, model: nn.Module) -> dict[str, Any]:
    documents, prompt, answers = [_ids(n) for n in (5, 23, 41)], _ids(19), [_ids(7), _ids(29)]
    segments = [
        Segment(ids, scored=[False] + [True] * (len(ids) - 1), row=row)
        for row, ids in enumerate(documents)
    ]
    segments.append(Segment(prompt))
    for row, ids in enumerate(answers, start=len(documents)):
        segments.append(Segment(ids, len(documents), scored=[True] * len(ids), row=row))
    batch = pack(segments, num_rows=len(documents) + len(answers), device="cpu")
    alone = [_alone(plain, ids, 1) for ids in documents]
    alone += [_alone(plain, prompt + ids, len(prompt)) for ids in answers]
    wanted, found = torch.cat(alone), packed_logps(model, batch).logps
    weights = torch.arange(len(wanted)).cos()
    slopes = [_gradients(m, x @ weights) for m, x in ((plain, wanted), (model, found))]
    return {
        "logps": _relative(found.detach(), wanted.detach()),
        "gradients": _relative(*(torch.cat([s[n].flatten() for n in slopes[0]]) for s in slopes)),
        **_generation(plain, model),
    }


def _generation(plain: nn.Module, model: nn.Module) -> dict[str, Any]:
    prompts = [_ids(9), _ids(21)]
    way = way_to_generate(model)
    generator = HFGenerator(model)
    drawn = generator.generate(prompts, Sampling(GREEDY_TOKENS, (STOP,)), 2)
    answers = [[completion.token_ids for completion in siblings] for siblings in drawn]
    sampled = torch.tensor([p for siblings in drawn for c in siblings for p in c.logps])
    with torch.no_grad():
        trained = packed_logps(model, pack_groups(prompts, answers, device="cpu")).logps
    greedy = generator.generate(prompts, Sampling(GREEDY_TOKENS, (STOP,), temperature=0.0))
    same = all(
        _greedy(plain, prompt) == siblings[0].token_ids
        for prompt, siblings in zip(prompts, greedy, strict=True)
    )
    return {"generation": way, "sampled": (trained - sampled).abs().max().item(), "greedy": same}


def _greedy(model: nn.Module, prompt: list[int]) -> list[int]:
    """The most likely tokens, each from a forward of the whole sequence."""
    ids = list(prompt)
    with torch.no_grad():
        while len(ids) < len(prompt) + GREEDY_TOKENS and STOP not in ids[len(prompt) :]:
            ids.append(_logits(model, ids)[-1].argmax().item())
    return ids[len(prompt) :]


def _logits(model: nn.Module, ids: list[int]) -> Tensor:
    accepted = inspect.signature(model.forward).parameters
    settings = {"use_cache": False} if "use_cache" in accepted else {}
    return model(input_ids=torch.tensor([ids]), **settings).logits[0]


def _ids(length: int) -> list[int]:
    return torch.randint(
        3, 300, (length,), generator=torch.Generator().manual_seed(length)
    ).tolist()


def _alone(model: nn.Module, ids: list[int], start: int) -> Tensor:
    log_probs = _logits(model, ids).log_softmax(-1)
    return log_probs[start - 1 : -1].gather(-1, torch.tensor(ids[start:])[:, None]).squeeze(-1)


def _gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    loss.backward()
    return {
        name: torch.zeros_like(weight) if weight.grad is None else weight.grad
        for name, weight in model.named_parameters()
    }


def _relative(found: Tensor, wanted: Tensor) -> float:
    return ((found - wanted).norm() / wanted.norm()).item()


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:160]


COLUMNS = ("family", "how", "log-probs, gradients", "generation", "reason")


def rows(verdicts: Iterable[Verdict]) -> Iterator[tuple[str, ...]]:
    """Yield a row of the table for each verdict."""
    for v in verdicts:
        measured, generation = "", ""
        if v.generation:
            measured = f"{v.logps:.0e}, {v.gradients:.0e}"
            generation = f"{v.generation}, {v.sampled:.0e}" + ("" if v.greedy else ", other tokens")
        yield v.name, v.how, measured, generation, v.reason


def main(config: Config) -> None:
    """Judge all, say each verdict as it comes, and write the table."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    verdicts = []
    for name in config.only or [*families(), *VARIANTS]:
        verdicts.append(judge(name))
        v = verdicts[-1]
        say(f"{v.name:28} {v.how:9} {v.logps:.0e} {v.gradients:.0e} {v.generation:8} {v.reason}")
    counts = Counter(verdict.how for verdict in verdicts)
    say(", ".join(f"{count} {how}" for how, count in counts.most_common()))
    if config.output:
        with open(config.output, "w", encoding="utf-8", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([COLUMNS, *rows(verdicts)])


if __name__ == "__main__":
    with plain_errors():
        main(parse(Config))
