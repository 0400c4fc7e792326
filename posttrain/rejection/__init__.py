"""Rejection sampling: a model's own answers, scored, of which the good ones become data.

    draw_answers(run / "answers.jsonl", **drawing_inputs(config, rewards))
    write_selection(run, keep=shortest_correct, pair=shortest_against_longer, min_reward=1.0)

The rules (rules.py) are plain functions of rewards and lengths. Importing this loads no torch.
"""
