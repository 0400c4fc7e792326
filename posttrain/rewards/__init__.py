"""Rewards: what an answer is worth, by rule. Text in, number out, and no torch.

A reward is called by keyword with lists, one entry for each answer, and returns one number each:

    reward(completions, *, prompts, completion_ids, **columns) -> list[float | None]

which is TRL's convention, so that a reward runs in both. None means "cannot be scored" and leaves
the answer out of its group's statistics. Each reward wraps a pure function of one sample
(`math.verify_math`, `format.is_think_answer`, `length.soft_overlong_penalty`) that is tested by
hand. By topic:

    math, choice, code       is the answer right? by mathematics, as text or a letter, by its tests
    format                   has it the think/answer shape?
    length, repetition       how long is it, and how much of that was there before?
    language                 is the reasoning in the language that was asked for?

`scoring.score` is how a trainer calls them all; docs/rewards.md compares them.
"""
