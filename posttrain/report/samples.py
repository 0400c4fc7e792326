"""The samples of a report: which are shown, in few bytes.

    packed = pack_samples(run)
    packed["samples"][0]       # {"s": step, "p": place in packed["prompts"], "r": reward, …}

Keys are short because there are many of them; report.js reads them. Texts are data, never markup:
posttrain.report.page writes them so that no browser takes them for anything else.
"""

from __future__ import annotations

import math
from typing import Any

from posttrain.report.block import size_of
from posttrain.report.run import Run

MOST_SAMPLES = 200
MOST_BYTES = 450_000  # of prompts and samples; the page's other parts stay below as much
MOST_CHARS = 2000  # of a prompt, or of a completion without its tokens
FEWEST_CHARS, RULE_CHARS = 100, 200  # of a text in a page that is full; of a rule at most

Packed = dict[str, Any]


def pack_samples(run: Run) -> Packed:
    """Choose and pack the samples.

    Returns:
        prompts: texts. parts: names of rewards. samples: for each its step `s`, prompt `p`, reward
        `r`, parts `v`, rules `w`, number of tokens `n`, end `e`, log-ratio `g` in nats, why it was
        written `c`, and its text, as tokens `t` with log-probs `l` in hundredths of a nat, or as a
        whole `x`; of a reward model's pairs also the margin `m`, score and margin of before the
        first step `b`, and which pair it is `k`.
        left_out: Number of samples of the run that are not here. bare: those without log-probs, to
        keep the page small.
    """
    chosen = choose(run.samples, MOST_SAMPLES)
    prompts: dict[str, int] = {}
    samples = [_pack(record, prompts, run.parts) for record in chosen]
    texts = _fitting(list(prompts), MOST_BYTES // 3)
    room = MOST_BYTES - size_of(texts)
    return {
        "prompts": texts,
        "parts": list(run.parts),
        "samples": samples,
        "left_out": len(run.samples) - len(chosen),
        "bare": _slim(samples, chosen, room),
    }


def _fitting(texts: list[str], room: int) -> list[str]:
    """Shorten texts until all fit, but none below FEWEST_CHARS."""
    most, found = MOST_CHARS, [shortened(text) for text in texts]
    while size_of(found) > room and most > FEWEST_CHARS:
        most = max(FEWEST_CHARS, most * 3 // 4)
        found = [shortened(text, most) for text in texts]
    return found


def choose(records: list[dict[str, Any]], most: int) -> list[dict[str, Any]]:
    """Keep at most so many records: those of the first and last steps, and some of those between.

    Held-out ones come first, as they show one prompt across steps, in at most half of the places.
    """
    held_out = [r for r in records if r.get("chosen") == "held out"]
    places = {id(r) for r in _spread(held_out, most // 2)} if len(records) > most else set()
    others = [r for r in records if r.get("chosen") != "held out"]
    room = most - len(places)
    kept = places | {id(r) for r in _spread(others, room)} if len(records) > most else set()
    return [r for r in records if id(r) in kept] if kept else list(records)


def _spread(records: list[dict[str, Any]], most: int) -> list[dict[str, Any]]:
    """The first, the last and those evenly between, whole steps at a time where steps fit."""
    if len(records) <= most:
        return records
    steps = list(dict.fromkeys(r.get("step", 0) for r in records))
    per_step = max(1, -(-len(records) // len(steps)))
    number = max(1, min(len(steps), most // per_step))
    last = max(1, number - 1)
    taken = {steps[round(i * (len(steps) - 1) / last)] for i in range(number)}
    return [r for r in records if r.get("step", 0) in taken][:most]


def _pack(record: dict[str, Any], prompts: dict[str, int], parts: tuple[str, ...]) -> Packed:
    prompt = text_of(record.get("prompt"))
    packed = {
        "s": record.get("step", 0),
        "p": prompts.setdefault(prompt, len(prompts)),
        "r": _number(record.get("reward")),
        "v": [_number(record.get(name)) for name in parts],
        "n": record.get("tokens", 0),
        "e": str(record.get("finish_reason", "")),
    }
    rules = record.get("rules") or {}
    if rules:
        packed["w"] = [
            shortened(str(rules[name]), RULE_CHARS) if name in rules else None for name in parts
        ]
    if _number(record.get("log_ratio")) is not None:
        packed["g"] = _number(record["log_ratio"])
    if _number(record.get("margin")) is not None:
        packed |= {"m": _number(record["margin"]), "k": str(record.get("pair", ""))}
        before = record.get("before")
        if isinstance(before, dict):
            packed["b"] = [_number(before.get("reward")), _number(before.get("margin"))]
    if record.get("chosen"):
        packed["c"] = str(record["chosen"])
    tokens = record.get("token_logps")
    if tokens:
        packed["t"] = [None if token is None else str(token[0]) for token in tokens]
        packed["l"] = [None if t is None else _hundredths(t[1]) for t in tokens]
    if not tokens or None in tokens:
        packed["x"] = shortened(text_of(record.get("completion")))
    return packed


def _slim(samples: list[Packed], records: list[dict[str, Any]], room: int) -> int:
    """Take the log-probs off the longest samples until all fit; return how many lost them."""
    sizes = [size_of(sample) for sample in samples]
    total, bare = sum(sizes), 0
    for place in sorted(range(len(samples)), key=sizes.__getitem__, reverse=True):
        if total <= room:
            break
        sample = samples[place]
        if "t" in sample:
            del sample["t"], sample["l"]
            bare += 1
        # A character may take six bytes as JSON writes it.
        most = max(FEWEST_CHARS, min(MOST_CHARS, room // len(samples) // 6))
        sample["x"] = shortened(text_of(records[place].get("completion")), most)
        total += size_of(sample) - sizes[place]
    return bare


def text_of(value: object) -> str:
    """Write a prompt or completion as text; messages by their roles."""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return "\n".join(
            f"{m.get('role', '')}: {m.get('content', '')}" if isinstance(m, dict) else str(m)
            for m in value
        )
    return "" if value is None else str(value)


def shortened(text: str, most: int = MOST_CHARS) -> str:
    """Cut the middle out of a text of more than `most` characters, and say how much."""
    if len(text) <= most:
        return text
    half = most // 2
    return f"{text[:half]} […{len(text) - 2 * half:,} characters…] {text[-half:]}"


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return round(value, 4)


def _hundredths(value: object) -> int | None:
    number = _number(value)
    return None if number is None else round(number * 100)
