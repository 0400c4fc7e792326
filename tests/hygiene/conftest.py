"""Small files, and the shipped tokenizer without a chat template and with one."""

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared" / "data"
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{{ m['content'] + '<|endoftext|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
needs_shared = pytest.mark.skipif(
    not SHARED.is_dir(), reason="the shared data is not beside the project"
)


def read(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def write(tmp_path):
    """Writes rows as JSON lines, returns the file's name."""

    def write_file(rows, name="rows.jsonl"):
        path = tmp_path / name
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        path.write_text("".join(lines), encoding="utf-8")
        return str(path)

    return write_file


@pytest.fixture
def output(tmp_path):
    return str(tmp_path / "out.jsonl")


@pytest.fixture(scope="session")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(ROOT / "data" / "tiny_tokenizer")


@pytest.fixture
def chat_tokenizer():
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(ROOT / "data" / "tiny_tokenizer")
    tokenizer.chat_template = CHATML
    return tokenizer
