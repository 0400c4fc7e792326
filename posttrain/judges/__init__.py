"""Rewards from judges: a language model that reads completions and says how good they are.

    judge = ScalarJudge(Verdicts(teacher, Budget(), path=run / "judgements.jsonl"))
    judge = PairwiseJudge(Verdicts(teacher, Budget()), rubric="A good answer …", rivals=2)
    rewards = {"judge": (judge, 1.0)}

The teacher is that of posttrain.self_instruct: a server (server.py), or a model on this machine by
the decode loop (local.py). prompts.py says what a judge reads and what it may answer.
"""
