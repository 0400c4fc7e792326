"""Data at the door: read any common file, find its format, check it, turn it into token ids.

    from posttrain.data import load_pairs
    pairs = load_pairs("data/pairs.jsonl", tokenizer)

Importing this loads neither torch nor datasets.
"""

from posttrain.data.load import load_documents, load_pairs, load_prompts, load_steps, load_unpaired
from posttrain.data.read import Records, Row, read_records

__all__ = [
    "Records",
    "Row",
    "load_documents",
    "load_pairs",
    "load_prompts",
    "load_steps",
    "load_unpaired",
    "read_records",
]
