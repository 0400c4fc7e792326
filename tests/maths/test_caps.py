"""What is refused before algebra, and what is not."""

from posttrain.maths.caps import refusal
from tests.cases import read_cases


def test_what_could_take_for_ever_is_refused_by_name():
    for case in read_cases(__file__, "caps", kind="refused"):
        assert case["why"] in refusal(case["text"]), case


def test_ordinary_answers_are_not_refused():
    for case in read_cases(__file__, "caps", kind="allowed"):
        assert refusal(case["text"]) == "", case
