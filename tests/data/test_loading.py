"""No row is lost uncounted: kept and dropped, by reason, are what was read."""

import re

import pytest

from posttrain.data import load_documents, load_pairs, load_prompts, load_steps, load_unpaired

MANY = 200  # rows that stay, so that one row of each fault is below the share that is refused
LONG = "long " * 20
TOO_LONG = "longer than 40 tokens"
SHARED = "\n\nHuman: q\n\nAssistant:"
USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


def dialogue(chosen, rejected):
    return {"chosen": chosen, "rejected": rejected}


def step_row(**changes):
    return {"prompt": "q", "completions": ["a", "b"], "labels": [True, False]} | changes


# For each loader: a row that stays, and rows that do not, with the reason that the summary gives.
CASES = {
    "documents": (
        load_documents,
        {"messages": [USER, ANSWER]},
        [
            ({"messages": [USER]}, "without an assistant turn"),
            ({"messages": [USER, ANSWER | {"content": " "}]}, "with an empty answer"),
            ({"messages": [USER | {"content": ""}, ANSWER]}, "with an empty prompt"),
            ({"messages": [USER | {"content": LONG}, ANSWER]}, TOO_LONG),
        ],
    ),
    "labelled documents": (
        load_documents,
        {"prompt": "q", "completion": "a", "label": True},
        [({"prompt": "q", "completion": "a", "label": False}, "labelled as a bad answer")],
    ),
    "pairs": (
        load_pairs,
        dialogue(SHARED + " a", SHARED + " b"),
        [
            (dialogue(SHARED + " a", "Other: r"), "whose chosen and rejected share no prompt"),
            (
                dialogue(SHARED + " a\n\nHuman: r\n\nAssistant: b", SHARED + " c"),
                "whose chosen and rejected part before the last answer",
            ),
            (dialogue(SHARED + " a", SHARED + " a"), "whose chosen equals rejected"),
            (dialogue(SHARED + " a", SHARED), "with an empty answer"),
            (dialogue(SHARED + " a", f"{SHARED} {LONG}"), TOO_LONG),
        ],
    ),
    "prompts": (
        load_prompts,
        {"question": "q", "answer": "7"},
        [
            ({"question": " ", "answer": "7"}, "with an empty prompt"),
            ({"question": "q", "answer": " "}, "with an empty answer"),
            ({"question": LONG, "answer": "7"}, TOO_LONG),
        ],
    ),
    "labelled answers": (
        load_unpaired,
        {"prompt": "q", "completion": "a", "label": True},
        [
            ({"prompt": "q", "completion": "", "label": True}, "with an empty answer"),
            ({"prompt": " ", "completion": "a", "label": True}, "with an empty prompt"),
            ({"prompt": "q", "completion": LONG, "label": False}, TOO_LONG),
        ],
    ),
    "labelled steps": (
        load_steps,
        step_row(),
        [
            (step_row(completions=["a", " "]), "with an empty answer"),
            (step_row(prompt=""), "with an empty prompt"),
            (step_row(completions=["a", LONG]), TOO_LONG),
        ],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_kept_and_dropped_by_reason_are_what_was_read(case, tokenizer, quiet):
    """Each fault stands twice, at both ends of the file."""
    load, good, faults = CASES[case]
    bad = [row for row, _ in faults]
    rows = [*bad, *[good] * MANY, *bad]
    limit = {"max_prompt_length" if load is load_prompts else "max_length": 40}
    if load is load_documents:
        limit["truncation"] = "drop"
    kept = load(rows, tokenizer, template="plain", say=quiet, **limit)
    reasons = [reason for _, reason in faults]
    num_kept = len(rows) - 2 * len(reasons)
    assert len(kept) == num_kept
    assert f": {len(rows)} rows of " in quiet.lines[0]
    assert f" -> {num_kept} " in quiet.lines[0]
    counts = re.findall(r"(\d+) ([a-z][^,;(]*) \(first: row (\d+)\)", quiet.lines[0])
    assert {reason: int(count) for count, reason, _ in counts} == dict.fromkeys(reasons, 2)
    assert f"dropped {2 * len(reasons)}: " in quiet.lines[0]


def test_both_answers_of_a_pair_are_counted_apart(tokenizer, quiet):
    rows = [dialogue(SHARED + " a", f"{SHARED} {LONG}"), dialogue(SHARED + " a", SHARED + " b")]
    kept = load_unpaired(rows, tokenizer, template="plain", max_length=40, say=quiet)
    assert len(kept) == 3
    assert f"dropped 1: 1 {TOO_LONG} (first: row 1)" in quiet.lines[0]


def test_each_instance_of_a_task_is_counted(tokenizer, quiet):
    instances = [{"input": "", "output": text} for text in ("a", "", "b")]
    task = {"instruction": "q", "instances": instances}
    other = {"instruction": "q", "instances": instances[:1]}
    kept = load_documents([task, *[other] * 100], tokenizer, template="plain", say=quiet)
    assert len(kept) == 102
    assert "dropped 1: 1 with an empty answer (first: row 1)" in quiet.lines[0]


def test_a_document_without_a_target_within_its_limit_is_counted(tokenizer, quiet):
    rows = [{"prompt": "q", "completion": "a"}, {"prompt": LONG, "completion": "a"}]
    assert len(load_documents(rows, tokenizer, template="plain", max_length=40, say=quiet)) == 1
    assert "dropped 1: 1 without a target within max_length (first: row 2)" in quiet.lines[0]


def test_a_prompt_that_a_template_leaves_without_a_token_is_counted(tokenizer, quiet):
    rows = [{"prompt": prompt, "chosen": "a", "rejected": "b"} for prompt in ["q"] * MANY + ["x"]]
    kept = load_pairs(rows, tokenizer, template=lambda e: e.instruction.strip("x"), say=quiet)
    assert len(kept) == MANY
    assert f"dropped 1: 1 with an empty prompt (first: row {MANY + 1})" in quiet.lines[0]
