"""The page as text: whole in itself, small, a point for each value, and no text as markup."""

import json
import re
from html.parser import HTMLParser

import pytest

from posttrain.errors import ConfigError, DataError
from posttrain.report.block import safe_json, size_of
from posttrain.report.page import write_report
from tests.report.runs import rl_line, rl_run, sample, sft_run, write_run

HOSTILE = (
    "</script><script>window.stolen = 1</script>",
    "<img src=x onerror='window.stolen = 1'>",
    "<!--<script>",
    "]]>",
    "{{ 7 * 7 }}{% raw %}",
    "\u2028alert(1)//\u2029",
    "&lt;b&gt;",
    "\x00\x1b[31m",
    "\u202egnirts",
    "\ud800 half a pair",
    "\"'`",
    "javascript:alert(1)",
    "</style></title></textarea>",
)


class Outline(HTMLParser):
    """All elements with their attributes, and the text in each kind of element."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements, self.texts, self.stack = [], {}, []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "input", "line", "circle", "path", "br"):
            self.stack.append(tag)

    def handle_endtag(self, tag):
        if tag in self.stack:
            while self.stack.pop() != tag:
                pass

    def handle_data(self, data):
        if self.stack:
            self.texts.setdefault(self.stack[-1], []).append(data)

    def all(self, tag, **attributes):
        return [
            found for name, found in self.elements
            if name == tag and attributes.items() <= found.items()
        ]  # fmt: skip


def page_of(folder) -> tuple[str, Outline]:
    text = write_report(folder).read_text(encoding="utf-8")
    return text, Outline(text)


def data_of(text: str) -> dict:
    block = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    return json.loads(block[1])


def test_the_page_has_its_seven_parts_and_asks_for_nothing(tmp_path):
    text, page = page_of(rl_run(tmp_path / "run"))
    ids = [a["id"] for a in page.all("section")]
    assert ids == ["result", "health", "curves", "hacking", "samples", "provenance"]
    assert {"throughput", "peak_memory_gb"} & {a["data-key"] for a in page.all("figure")}
    assert "Speed and memory" in text
    loaded = [a for tag, a in page.elements if "src" in a or tag in ("link", "iframe", "object")]
    assert loaded == []
    assert "http" not in re.sub(r"http-equiv|http://www.w3.org", "", text)
    (policy,) = page.all("meta", **{"http-equiv": "Content-Security-Policy"})
    assert policy["content"].startswith("default-src 'none'")
    assert not any(name.startswith("on") or name == "style" for _, a in page.elements for name in a)


def test_every_logged_value_is_a_point_of_its_chart(tmp_path):
    _, page = page_of(rl_run(tmp_path / "run", steps=37))
    drawn = [a for a in page.all("path") if "data-points" in a]
    assert {int(a["data-points"]) for a in drawn} == {37, 3}  # lines, and evaluations
    for curve in drawn:
        assert len(re.findall("[ML]", curve["d"])) == int(curve["data-points"])


def test_a_long_run_is_thinned_and_not_cut(tmp_path):
    steps = 2300
    text, page = page_of(rl_run(tmp_path / "run", steps=steps))
    points = {int(a["data-points"]) for a in page.all("path") if "data-points" in a}
    assert points == {767, 3}  # 2,300 in threes
    assert max(map(max, data_of(text)["steps"])) == steps


def test_500_steps_and_200_long_samples_are_at_most_a_megabyte(tmp_path):
    words = " ".join(f"word{i}" for i in range(400))
    samples = [
        sample(1 + i // 2 * 5, i, prompt=f"Question {i}" + "x" * 3000, text=words)
        for i in range(200)
    ]
    path = write_report(rl_run(tmp_path / "run", steps=500, samples=samples))
    assert path.stat().st_size < 1_000_000
    found = data_of(path.read_text(encoding="utf-8"))
    assert len(found["samples"]) == 200
    assert found["bare"] > 0  # some lost their log-probs, and the page says so
    assert "long ones are shown without log-probs" in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("character", ["<", "\u6211", "\x00"])
def test_texts_that_take_many_bytes_are_counted_as_they_are_written(tmp_path, character):
    """A `<` is written in six bytes, and a Chinese character in three."""
    text, prompt = " ".join([character * 5] * 300), character * 3000
    samples = [sample(1 + i // 2 * 5, i, prompt=f"{i}{prompt}", text=text) for i in range(200)]
    for record in samples:
        record["rules"] = {"accuracy": character * 5000}
    path = write_report(rl_run(tmp_path / "run", steps=500, samples=samples))
    assert path.stat().st_size < 1_000_000
    assert len(data_of(path.read_text(encoding="utf-8"))["samples"]) == 200


def test_500_steps_and_200_short_samples_keep_every_log_prob(tmp_path):
    samples = [sample(1 + i // 2 * 5, i, text="a b c d e f g h " * 8) for i in range(200)]
    path = write_report(rl_run(tmp_path / "run", steps=500, samples=samples))
    found = data_of(path.read_text(encoding="utf-8"))
    assert path.stat().st_size < 1_000_000
    assert found["bare"] == 0
    assert found["samples"][0]["l"][:3] == [0, -30, -60]  # hundredths of a nat


def test_no_text_of_a_model_or_a_setting_is_markup(tmp_path):
    samples = [sample(1, i, prompt=text, text=text, chosen=text) for i, text in enumerate(HOSTILE)]
    for record, text in zip(samples, HOSTILE, strict=True):
        record["rules"] = {"accuracy": text}
        record["finish_reason"] = text
    lines = [{**rl_line(step, 4), HOSTILE[1]: 1.0} for step in range(1, 5)]
    folder = write_run(
        tmp_path / "run", lines, samples=samples, config={"dataset": HOSTILE[0], HOSTILE[1]: 1},
        command=HOSTILE[0], trainer=HOSTILE[1], defaults={"dataset": HOSTILE[12]},
    )  # fmt: skip
    text, page = page_of(folder)
    assert len(page.all("script")) == 2
    assert len(page.all("style")) == len(page.all("title")) == 1
    assert page.all("img") == page.all("textarea") == page.all("b") == []
    assert "<script>window" not in text
    assert not {"\u2028", "\u2029"} & set(text)
    shown = {data_of(text)["prompts"][s["p"]] for s in data_of(text)["samples"]}
    assert shown == {hostile.replace("\ud800", "?") for hostile in HOSTILE}


def test_json_in_a_script_holds_no_character_that_could_end_it():
    value = {"text": "".join(HOSTILE[:8])}
    written = safe_json(value)
    assert not set("<>&\u2028\u2029") & set(written)
    assert json.loads(written) == value
    assert size_of(value) == len(written.encode())


def test_charts_have_names_descriptions_and_their_numbers_as_a_table(tmp_path):
    _, page = page_of(rl_run(tmp_path / "run"))
    ids = {a["id"] for _, a in page.elements if "id" in a}
    charts = page.all("svg", role="img")
    assert (
        len(charts) == len(page.all("figure")) == len(page.all("details", **{"class": "numbers"}))
    )
    for chart in charts:
        assert chart["tabindex"] == "0"
        named = [*chart["aria-labelledby"].split(), *chart["aria-describedby"].split()]
        assert set(named) <= ids
    for section in page.all("section"):
        assert section["aria-labelledby"] in ids
    assert len(ids) == len([a for _, a in page.elements if "id" in a])  # none is there twice


def test_a_metric_that_nobody_has_heard_of_has_a_chart_of_its_own(tmp_path):
    lines = [{"step": s, "loss": 1.0, "medusa/head 1 accuracy": 0.1 * s} for s in range(1, 6)]
    text, page = page_of(write_run(tmp_path / "run", lines, rewards={}))
    assert len(page.all("figure", **{"data-key": "medusa_head_1_accuracy"})) == 1
    assert "medusa/head 1 accuracy" in text


def test_a_run_without_samples_says_so(tmp_path):
    text, page = page_of(sft_run(tmp_path / "run"))
    assert "This run generated nothing" in text
    assert page.all("form") == []


def test_changed_settings_are_marked_and_come_first(tmp_path):
    text, page = page_of(rl_run(tmp_path / "run"))
    assert page.texts["mark"] == ["0.0001"]
    settings = text.partition("<caption>Settings")[2]
    rows = re.findall(r'<tr( class="changed")?><th scope="row">(\w+)</th>', settings)
    assert rows[0] == (' class="changed"', "learning_rate")
    assert [name for is_changed, name in rows if is_changed] == ["learning_rate"]
    for fact in ("a" * 64, "f" * 40, "torch 2.13.0", "train 1000, held_out 512"):
        assert fact in text


def test_a_folder_that_is_no_run_is_one_line(tmp_path):
    with pytest.raises(ConfigError, match=r"expected a run folder with config.yaml, env.json"):
        write_report(tmp_path)


def test_a_damaged_line_is_named_and_one_that_is_being_written_left_out(tmp_path):
    folder = rl_run(tmp_path / "run", steps=4)
    path = folder / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 5, "lo')
    assert write_report(folder).is_file()
    path.write_text('{"step": 1}\nnot JSON\n')
    with pytest.raises(DataError, match=r"metrics.jsonl, row 2: expected a record in JSON"):
        write_report(folder)
