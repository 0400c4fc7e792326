"""The forms of final answers, and the bounds beyond which there is none."""

import pytest

from posttrain.maths.shapes import MAX_NESTING, MAX_PARTS, Unreadable, as_interval, read_shape


@pytest.mark.parametrize(
    ("text", "kind", "num_parts"),
    [
        ("5", "value", 0),
        (r"\{1, 2\}", "set", 2),
        ("1, 2 or 3", "list", 3),
        (r"1 \pm \sqrt{2}", "list", 2),
        ("(1, 2)", "tuple", 2),
        ("[1, 2)", "interval", 2),
        (r"(1, 2) \cup (3, 4)", "union", 2),
        (r"1 < x \le 2", "relation", 3),
        ("x + y = 1", "equation", 2),
        (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", "matrix", 0),
        ("1,000", "value", 0),
    ],
)
def test_the_kind_of_an_answer_is_read_from_its_form(text, kind, num_parts):
    shape = read_shape(text)
    assert (shape.kind, len(shape.parts)) == (kind, num_parts)


def test_a_name_is_no_part_of_the_value():
    assert (read_shape("x = 5").text, read_shape("x = 5").name) == ("5", "x")


def test_an_inequality_of_one_name_is_an_interval():
    interval = as_interval(read_shape(r"1 < x \le 2"))
    assert (interval.marks, [part.text for part in interval.parts]) == (("(", "]"), ["1", "2"])


def test_the_number_of_parts_and_the_depth_are_bounded():
    assert len(read_shape(", ".join(["1"] * MAX_PARTS)).parts) == MAX_PARTS
    with pytest.raises(Unreadable, match="parts"):
        read_shape(", ".join(["1"] * (MAX_PARTS + 1)))
    deep = MAX_NESTING + 1
    with pytest.raises(Unreadable, match="deeply"):
        read_shape("(" * deep + "1" + ")" * deep)
