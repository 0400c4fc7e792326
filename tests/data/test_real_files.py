"""Real data by its path alone: GSM8K, HH-RLHF and the self-instruct seeds. Skipped when absent."""

from pathlib import Path

import pytest

from posttrain.data import load_documents, load_pairs, load_prompts, read_records

DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"
needs = pytest.mark.skipif(not DATA.is_dir(), reason="the shared data is not beside the project")


@needs
def test_gsm8k_gives_documents_without_marks_and_prompts_with_numbers(
    tokenizer, number_tokenizer, quiet
):
    source = DATA / "gsm8k" / "test.jsonl"
    documents = load_documents(source, tokenizer, say=quiet)
    assert len(documents) == 1319
    first = tokenizer.decode(documents[0]["input_ids"])
    assert "16 - 3 - 4 = 9 duck eggs" in first
    assert first.endswith("\n#### 18</s>")
    prompts = load_prompts(source, number_tokenizer, say=quiet)
    assert prompts["answer"][:3] == ["18", "3", "70000"]
    assert all(answer.lstrip("-").replace(".", "").isdigit() for answer in prompts["answer"])


@needs
def test_hh_rlhf_gives_every_pair_that_shares_its_prompt(number_tokenizer, tokenizer, quiet):
    """2,312 rows: 5 part before the last answer, 4 have an empty one."""
    records = read_records(DATA / "hh_rlhf")
    assert len(load_pairs(records, number_tokenizer, max_length=8192, say=quiet)) == 2303
    assert "5 whose chosen and rejected part before the last answer" in quiet.lines[0]
    assert "4 with an empty answer" in quiet.lines[0]
    (pair,) = load_pairs([next(iter(records)).values], tokenizer, max_length=8192, say=quiet)
    assert tokenizer.decode(pair["prompt_ids"]).endswith("\n\nAssistant:")


@needs
def test_the_seed_tasks_are_175_documents(tokenizer, quiet):
    source = DATA / "self_instruct" / "seed_tasks.jsonl"
    documents = load_documents(source, tokenizer, max_length=8192, say=quiet)
    assert len(documents) == 175
    texts = [tokenizer.decode(ids) for ids in documents["input_ids"]]
    assert sum("### Input:" in text for text in texts) == 125
