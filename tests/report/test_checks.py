"""Health checks over a whole run, and docs/troubleshooting.md, which has a heading for each."""

import re
from pathlib import Path

import pytest

from posttrain.report.checks import JUDGEMENTS, anchor_of, checks_of
from posttrain.report.page import write_report
from posttrain.report.run import read_run
from posttrain.run.watch import CHECKS, Watch
from tests.report.runs import rl_line, rl_run, sft_run, write_run
from tests.run.test_watch import ILL, PARTS, lines

PAGE = (Path(__file__).parents[2] / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
NUMBER = r"-?\d+([.,]\d+)*(e[-+]?\d+)?%?"


def health(folder) -> dict:
    return {found.name: found for found in checks_of(read_run(folder))}


def steps_of(values: dict[str, list[float]]) -> list[dict]:
    count = max(map(len, values.values()))
    return [
        {"step": i + 1, "loss": 1.0, **{k: v[min(i, len(v) - 1)] for k, v in values.items()}}
        for i in range(count)
    ]


SICK = {
    "rising loss": ({"loss": [1.0, 1.0, 2.0, 2.0]}, []),
    "overfitting": ({"loss": [1.0]}, [1.0, 0.8, 0.9]),
    "gradient always clipped": ({"grad_norm": [3.0, 2.0, 2.0, 2.0]}, []),
    "sinking completions": (
        {"chosen_log_ratio": [0.0, -3.0, -9.0, -20.0], "margin": [0.0, 1.0, 2.0, 9.0]}, [],
    ),
}  # fmt: skip


def sick_run(folder, name):
    values, losses = SICK[name]
    evaluations = [{"step": i, "eval_loss": loss} for i, loss in enumerate(losses)]
    return write_run(folder, [*steps_of(values), *evaluations], rewards={})


@pytest.mark.parametrize("name", SICK)
def test_each_illness_of_any_run_is_found_and_no_other(tmp_path, name):
    found = health(sick_run(tmp_path / "run", name))
    assert [n for n, h in found.items() if h.holds] == [name]


def test_a_run_that_learns_is_left_in_peace(tmp_path):
    found = health(sft_run(tmp_path / "run"))
    assert set(found) == {judgement.name for judgement in JUDGEMENTS} == set(SICK)
    assert {h.status for h in found.values()} == {"fine"}


def test_the_checks_of_rl_are_those_that_it_was_watched_by_with_their_steps(tmp_path):
    run = [rl_line(step, 8) for step in range(1, 9)]
    for line in run[2:6]:
        line["truncated"] = 0.5
    for line in run[6:]:
        line["truncated"] = 0.0
    found = health(write_run(tmp_path / "run", run))
    assert {check.name for check in CHECKS} <= set(found)
    truncated = found["truncated answers"]
    assert (truncated.status, truncated.holds) == ("warning", False)
    assert truncated.when == "steps 3 to 6, on 4 of 8 log lines"
    assert "50% of the completions reached" in truncated.text


def template(text: str) -> str:
    """A sentence with N for its numbers, and the names of rewards as in the page."""
    return re.sub(NUMBER, "N", text)


def texts_of_watch() -> dict[str, str]:
    """The sentence of each of RL's checks, from a run that has the illness."""
    found = {}
    for name, course in ILL.items():
        watch = Watch(PARTS)
        for line in lines(**course):
            found |= {f.name: f.text for f in watch.read(line) if f.name == name}
    return found


def section(name: str) -> str:
    """What docs/troubleshooting.md quotes under the heading of a check, in one line."""
    text = PAGE.partition(f"\n## {name}\n")[2].partition("\n## ")[0]
    assert text, f"no heading '{name}'"
    quoted = [line.removeprefix("> ") for line in text.splitlines() if line.startswith("> ")]
    return " ".join(quoted)


def test_the_page_has_the_exact_text_of_every_check(tmp_path):
    texts = texts_of_watch()
    for name in SICK:
        texts[name] = health(sick_run(tmp_path / name, name))[name].text
    assert set(texts) == {c.name for c in CHECKS} | {j.name for j in JUDGEMENTS}
    assert {name: template(text) for name, text in texts.items()} == {n: section(n) for n in texts}


def test_the_page_has_no_heading_of_a_check_that_is_gone():
    headings = set(re.findall(r"^## (.+)$", PAGE, re.MULTILINE))
    assert headings == {c.name for c in CHECKS} | {j.name for j in JUDGEMENTS}


def test_a_report_links_to_the_heading(tmp_path):
    folder = sick_run(tmp_path / "run", "rising loss")
    text = write_report(folder).read_text(encoding="utf-8")
    (link,) = re.findall(r'href="([^"]+troubleshooting.md)#rising-loss"', text)
    assert (folder / link).resolve().read_text(encoding="utf-8") == PAGE


@pytest.mark.parametrize(
    ("name", "anchor"), [("KL runaway", "kl-runaway"), ("rising loss", "rising-loss")]
)
def test_anchors_are_those_that_markdown_gives_to_headings(name, anchor):
    assert anchor_of(name) == anchor


def test_a_run_without_the_metrics_of_a_check_has_not_got_it(tmp_path):
    assert "entropy collapse" not in health(sft_run(tmp_path / "run"))
    assert health(rl_run(tmp_path / "rl"))["entropy collapse"].status == "fine"
