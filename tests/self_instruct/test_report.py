"""The numbers of the report."""

from posttrain.self_instruct.filters import Rejected
from posttrain.self_instruct.methods import Collection
from posttrain.self_instruct.report import Lengths, make_report
from posttrain.self_instruct.tasks import Task


def made() -> Collection:
    collection = Collection([], blacklist=())
    collection.records += [
        Task("Write a poem", "", "one two three"),
        Task("Write a long poem", "x y", "one"),
        Task("Sort the list", "3 1 2", "1 2 3 4 5"),
    ]
    collection.reject(Rejected("too short"), "tasks-00000", text="a")
    collection.reject(Rejected("truncated"), "tasks-00000", text="b")
    collection.reject(Rejected("too short"), "tasks-00001", text="c")
    return collection


def test_the_report_counts_lengths_in_words_and_rejections_in_the_filters_order():
    """Outputs have 3, 1 and 5 words: mean 3, median 3."""
    report = make_report(made(), stopped="enough")
    assert (report.kept, report.with_input, report.stopped) == (3, 2, "enough")
    assert list(report.rejected.items()) == [("truncated", 1), ("too short", 2)]
    assert report.words["output"] == Lengths(mean=3.0, p50=3, p95=5, max=5)
    assert report.words["input"] == Lengths(mean=2.5, p50=2, p95=3, max=3)
    assert (report.num_verbs, report.num_verb_noun) == (2, 2)
    assert report.verb_noun == [("write", "poem", 2), ("sort", "list", 1)]


def test_a_run_that_kept_nothing_still_has_a_report():
    report = make_report(Collection([], blacklist=()))
    assert report.kept == 0
    assert report.words["output"].max == 0
