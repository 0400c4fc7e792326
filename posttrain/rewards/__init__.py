"""Rewards: scores of completions by rule. Text in, number out, and no torch.

A reward is called by keyword, with lists of one entry per completion, and returns one number each:

    reward(completions, *, prompts, completion_ids, **columns) -> list[float | None]

This is TRL's convention, so that a reward runs in both. None means "cannot be scored" and leaves
the completion out of its group's statistics. Each reward wraps a pure function of one sample
(`math.verify_math`, `format.is_think_answer`, `length.soft_overlong_penalty`) that is tested by
hand. By topic:

    math, choice, code       correctness: by mathematics, as text or a letter, by tests
    format                   the think/answer shape
    length, repetition       the number of tokens, and the share of them that repeats earlier ones
    language                 the language of the reasoning

A trainer calls them through `call.score`; docs/rewards.md compares them.
"""
