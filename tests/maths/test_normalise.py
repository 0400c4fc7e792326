"""One spelling for answers that are written differently."""

from posttrain.maths.normalise import normalise
from tests.cases import read_cases


def test_normalising_gives_one_spelling():
    found = {c["text"]: normalise(c["text"]).strip() for c in read_cases(__file__, "normalise")}
    assert found == {c["text"]: c["spelling"] for c in read_cases(__file__, "normalise")}
