"""Data hygiene: check, dedup, decontaminate, mix, split, show, convert.

Rows are read as a stream, never whole; what is held of a row is a few hundred bytes. Nothing is
overwritten, and what is removed is written beside, with the reason. The commands are in
posttrain/commands/data.py.
"""
