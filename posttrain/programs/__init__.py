"""Judging programs by tests that run in a sandbox, where the program never sees them.

In the order of use: `extraction`, `tests`, `splitting`, `judge`, and `judge_program`, which `judge`
sends to a sandbox. `posttrain.rewards.code` puts them together.
"""
