"""Rejection sampling: a model's own completions, scored; the good ones become training data.

    sample_completions(run / "answers.jsonl", prompts, roll_out, prompts_per_batch=32)
    write_selection(run, keep=shortest_correct, pair=shortest_against_longer, right_by="accuracy")

The rules (rules.py) are plain functions of the Completions of one prompt.
Importing this loads no torch.
"""
