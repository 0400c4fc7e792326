"""Data hygiene: check, deduplicate, decontaminate, mix, split, show and convert files of rows.

    from posttrain.hygiene.duplicates import deduplicate
    from posttrain.hygiene.rows import RowStream
    deduplicate(RowStream(["my.jsonl"]), "my.unique.jsonl")

Rows are read as a stream, never whole; what is held of a row is a few hundred bytes. Nothing is
overwritten, and what is removed is written beside, with the reason. The commands are in
posttrain/commands/data.py.
"""
