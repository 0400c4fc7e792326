"""The plots show what they are given."""

import re
from xml.etree import ElementTree

from benchmarks.plot import line_plot


def test_a_proportion_is_drawn_as_a_line_through_the_origin():
    picture = line_plot([(1, 2.0), (2, 4.0), (4, 8.0)], across="tokens", up="seconds < 9")
    ElementTree.fromstring(picture)
    axis = re.search(r'd="M([\d.]+) [\d.]+ V([\d.]+)', picture)
    x0, y0 = float(axis[1]), float(axis[2])
    line = re.search(r'points="([^"]+)"', picture)[1]
    slopes = [
        (y0 - float(y)) / (float(x) - x0) for x, y in (pair.split(",") for pair in line.split())
    ]
    assert max(slopes) - min(slopes) < 0.01
