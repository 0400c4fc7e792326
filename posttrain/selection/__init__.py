"""Rejection sampling: a model's own answers, scored, of which the good ones become data.

    draw_answers(run / "answers.jsonl", **drawing_inputs(config, rewards))
    write_selection(run, keep=shortest_correct, pair=shortest_against_longer, right_by="accuracy")

The rules (rules.py) are plain functions of rewards, lengths and rightness.
Importing this loads no torch.
"""
