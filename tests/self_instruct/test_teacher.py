"""What every teacher is asked."""

from posttrain.self_instruct.teacher import Request


def test_a_key_is_that_of_the_content_in_any_process():
    request = Request("tasks-00000", "Grüße", max_tokens=3, stop=("\n",))
    assert request.key == "f2c0e1017ff4ce80"
