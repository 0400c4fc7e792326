"""missing_eos: cut answers cost, whole ones do not."""

from posttrain.rewards.length import missing_eos


def test_only_answers_without_a_stop_token_at_their_end_are_penalised():
    """(5, 1) and (2,) end; (1, 5) has the token in its middle; an empty answer has none."""
    assert missing_eos([[5, 1], [2], [1, 5], []], stop_ids={1, 2}) == [0, 0, -1, -1]


def test_it_ignores_the_other_columns_of_a_call():
    assert missing_eos(completion_ids=[[7]], stop_ids=(1,), prompts=["x"], answer=["y"]) == [-1]
