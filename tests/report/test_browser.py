"""The page in a real browser, where one is installed: charts, filters, themes, keys, no request."""

import base64
from itertools import pairwise

import pytest

from posttrain.report.page import write_comparison, write_report
from tests.report.browser import PATH, Browser
from tests.report.runs import PARTS, rl_line, rl_run, sample, sft_run, write_run
from tests.report.test_page import HOSTILE

pytestmark = pytest.mark.skipif(
    PATH is None, reason="no Chromium here: apt-get install chromium runs these tests"
)
STEPS = 40
# Each text with its colour and, of what is below it, the colours on one another.
SEEN = """[...document.querySelectorAll('body *')].filter(element =>
  element.checkVisibility() && element.getClientRects().length
  && [...element.childNodes].some(node => node.nodeType === 3 && node.data.trim())
).map(element => {
  const style = getComputedStyle(element);
  const layers = [];
  for (let below = element; below; below = below.parentElement)
    layers.push(getComputedStyle(below).backgroundColor.match(/[\\d.]+/g).map(Number));
  const color = layers.reverse().reduce((under, [r, g, b, share = 1]) =>
    [r, g, b].map((part, i) => part * share + under[i] * (1 - share)), [255, 255, 255]);
  const of = element.closest('svg') ? style.fill : style.color;
  return [element.textContent, of, `rgb(${color.map(Math.round)})`];
})"""
LIGHTS = (
    "((over, under) => [getComputedStyle(over).color, getComputedStyle(under).backgroundColor])"
)


@pytest.fixture(scope="module")
def browser():
    with Browser() as browser:
        yield browser


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return rl_run(tmp_path_factory.mktemp("browser") / "run", steps=STEPS)


@pytest.fixture(scope="module")
def page(browser, folder):
    return browser.open(write_report(folder).as_uri())


def fill(page, **values):
    """Set fields of the filters as a person would."""
    page.run("document.getElementById('filters').reset()")
    for name, value in values.items():
        page.run(
            f"{{const field = document.getElementById('filters').elements.{name};"
            f"field.value = {value!r};"
            "field.dispatchEvent(new Event('input', {bubbles: true}));}"
        )


def shown(page) -> list[str]:
    """The first lines of the samples that are listed."""
    return page.run(
        "[...document.querySelectorAll('#list article > .title')].map(p => p.textContent)"
    )


def test_every_chart_is_drawn_with_a_point_for_each_value(page):
    curves = page.run(
        "[...document.querySelectorAll('.chart path[data-points]')].map(p => ["
        "Number(p.dataset.points), p.getAttribute('d').match(/[ML]/g).length,"
        "p.getTotalLength(), p.getBBox().x >= 0 && p.getBBox().x + p.getBBox().width <= 480])"
    )
    assert len(curves) > 20
    for points, drawn, length, is_inside in curves:
        assert points == drawn
        assert points in (STEPS, 3)
        assert length > 0
        assert is_inside


def test_nothing_is_asked_for_and_nothing_complains(browser, folder):
    page = browser.open(write_report(folder).as_uri())
    fill(page, text="step")
    assert page.requests == [(folder / "report.html").as_uri()]
    assert page.problems == []


def test_the_filters_show_what_they_say(page):
    fill(page, step0="11", step1="21", kind="train")
    assert len(shown(page)) == 6
    assert {line.split(",")[0] for line in shown(page)} == {"step 11", "step 21"}
    fill(page, text="step 31<")
    assert [line.split(",")[0] for line in shown(page)] == ["step 31"] * 3
    fill(page, part="0", value0="1", value1="1")
    assert all("reward 1.2" in line for line in shown(page))
    fill(page, kind="held out", order="old")
    assert [line.split(",")[0] for line in shown(page)] == ["step 0", "step 20", "step 40"]
    fill(page, order="best")
    rewards = [float(line.split("reward ")[1].split(",")[0]) for line in shown(page)]
    assert rewards == sorted(rewards, reverse=True)
    fill(page, order="worst")
    assert [float(line.split("reward ")[1].split(",")[0]) for line in shown(page)] == rewards[::-1]
    fill(page, order="random")
    assert shown(page) not in (sorted(shown(page)), sorted(shown(page), reverse=True))
    fill(page, length0="1000")
    assert shown(page) == []
    assert page.run("document.getElementById('count').textContent") == "0 of 15 samples"
    fill(page, text="")
    assert len(shown(page)) == 15


def test_one_prompt_stands_side_by_side_across_steps(page):
    option = page.run(
        "[...document.getElementById('filters').elements.prompt.options]"
        ".find(o => o.textContent.includes('2 + 2?')).value"
    )
    fill(page, prompt=option)
    assert [line.split(",")[0] for line in shown(page)] == ["step 0", "step 20", "step 40"]
    tops = page.run(
        "[...document.querySelectorAll('#list article')].map(a => a.getBoundingClientRect().top)"
    )
    assert len(set(tops)) == 1
    fill(page, prompt="")


def test_a_reward_models_pairs_show_scores_and_margins_before_and_after(browser, tmp_path):
    samples = [
        sample(4, number, chosen=side, pair=pair, reward=score, margin=margin,
               before={"reward": 0.25, "margin": 0.0})
        for number, (pair, margin) in enumerate((("best", 2.0), ("worst", -0.5)))
        for side, score in (("chosen", margin / 2), ("rejected", -margin / 2))
    ]  # fmt: skip
    page = browser.open(write_report(sft_run(tmp_path / "run", samples=samples)).as_uri())
    fill(page, order="worst")
    lines = shown(page)
    assert lines[0].startswith(
        "step 4, score -0.25 (0.25 before training), margin -0.5 (0 before training), "
    )
    assert [line.rpartition("held out, ")[2] for line in lines] == [
        "chosen, worst pair", "rejected, worst pair", "chosen, best pair", "rejected, best pair"
    ]  # fmt: skip
    fill(page, order="best")
    assert shown(page)[0].endswith("chosen, best pair")
    assert page.problems == []


def test_a_token_shows_its_log_prob_and_the_end_token_is_seen(page):
    fill(page, step0="1", step1="1", kind="train")
    place = page.run(
        "(() => {const t = document.querySelector('#list .tokens [data-l=\"-30\"]');"
        "t.scrollIntoView({block: 'center', behavior: 'instant'});"
        "const b = t.getBoundingClientRect(); return [b.x + b.width / 2, b.y + b.height / 2];})()"
    )
    page.move(*place)
    tip = page.run("document.getElementById('tip').textContent")
    assert tip == "log-prob -0.30, probability 74.1 %"
    assert page.run("document.querySelector('#list .end').textContent") == "<|end|>"
    page.move(1, 1)
    assert page.run("document.getElementById('tip').hidden") is True


def test_the_arrow_keys_and_the_pointer_move_one_step_in_all_charts(page):
    page.run("document.querySelector('#chart-loss svg').focus()")
    page.press("Home")
    page.press("ArrowRight")
    read = "[...document.querySelectorAll('.readout')].map(r => r.textContent)"
    assert all(text.startswith("step 2: ") for text in page.run(read))
    page.run("document.activeElement.blur()")
    assert set(page.run(read)) == {""}
    left, top, width, height = page.run(
        "(() => {const s = document.querySelector('#chart-loss svg');"
        "s.scrollIntoView({block: 'center', behavior: 'instant'});"
        "const b = s.getBoundingClientRect(); return [b.x, b.y, b.width, b.height];})()"
    )
    page.move(left + width * 470 / 480, top + height / 2)
    assert all(text.startswith(f"step {STEPS}: ") for text in page.run(read))
    assert "step 40: 40" not in page.run(read)
    page.move(1, 1)


def test_the_numbers_of_a_chart_are_a_table(page):
    rows = page.run(
        "(async () => {const d = document.querySelector('#chart-loss details'); d.open = true;"
        "await new Promise(done => setTimeout(done, 50));"
        "return [...d.querySelectorAll('.all tbody tr')].map(r => r.cells[0].textContent);})()"
    )
    assert rows == [str(step) for step in range(1, STEPS + 1)]


@pytest.mark.parametrize(("theme", "other"), [("light", "dark"), ("dark", "light")])
def test_both_themes_can_be_read_and_the_button_changes_them(browser, folder, theme, other):
    page = browser.open(write_report(folder).as_uri(), theme=theme)
    colors = f"{LIGHTS}(document.body, document.body)"
    assert contrast(*page.run(colors)) > 7
    first = page.run(colors)
    page.run("document.getElementById('theme').click()")
    assert page.run("document.documentElement.dataset.theme") == other
    assert page.run(colors) != first
    assert contrast(*page.run(colors)) > 7
    find = "document.querySelector('{}')".format
    soft = f"{LIGHTS}({find('.meaning')}, {find('.chart')})"
    assert contrast(*page.run(soft)) > 4.5


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_every_text_and_every_line_stands_out_from_what_is_below_it(browser, folder, theme):
    """4.5 to 1 for texts and 3 to 1 for lines, as WCAG 2.2 asks for."""
    page = browser.open(write_report(folder).as_uri(), theme=theme)
    for text, color, below in page.run(SEEN):
        assert contrast(color, below) > 4.5, text
    for color, below in page.run(
        "[...document.querySelectorAll('path.whole')].map(p => [getComputedStyle(p).stroke,"
        "getComputedStyle(p.closest('figure, th')).backgroundColor])"
    ):
        assert contrast(color, below) > 3


def contrast(*colors: str) -> float:
    """The contrast ratio of WCAG 2 for two colours `rgb(r, g, b)`."""
    lights = []
    for color in colors:
        parts = [int(x) / 255 for x in color.partition("(")[2].rstrip(")").split(",")[:3]]
        linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
        lights.append(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2])
    return (max(lights) + 0.05) / (min(lights) + 0.05)


def test_hostile_texts_are_shown_as_texts(browser, tmp_path):
    samples = [sample(1, i, prompt=text, text=text, chosen=text) for i, text in enumerate(HOSTILE)]
    samples += [sample(2, 1, completion=text, token_logps=None) for text in HOSTILE]
    for record, text in zip(samples, HOSTILE, strict=False):
        record["rules"] = {"accuracy": text}
    lines = [{**rl_line(step, 4), HOSTILE[1]: 1.0} for step in range(1, 5)]
    folder = write_run(tmp_path / "run", lines, samples=samples, command=HOSTILE[0])
    page = browser.open(write_report(folder).as_uri())
    page.run("document.getElementById('more').click()")
    assert page.run("typeof window.stolen") == "undefined"
    assert page.run("document.querySelectorAll('#samples img, #samples script').length") == 0
    assert page.run("document.querySelectorAll('#list article').length") == len(samples)
    texts = page.run("[...document.querySelectorAll('#list pre')].map(p => p.textContent).join('')")
    assert HOSTILE[0] in texts
    assert page.problems == []
    assert len(page.requests) == 1
    path = write_comparison([folder, folder], tmp_path / "compare.html")
    page = browser.open(path.as_uri())
    assert page.run("typeof window.stolen") == "undefined"
    assert page.run("document.querySelectorAll('img, body script').length") == 2  # its own
    assert HOSTILE[0] in page.run("document.getElementById('samples').textContent")
    assert page.problems == []


def test_a_run_without_rewards_and_a_comparison_open_without_complaint(browser, folder, tmp_path):
    sft = sft_run(tmp_path / "sft")
    first = browser.open(write_report(sft).as_uri())
    assert first.run("document.querySelectorAll('.chart').length") == 3
    path = write_comparison([folder, sft], tmp_path / "compare.html")
    second = browser.open(path.as_uri())
    assert second.run("document.querySelectorAll('#chart-loss path[data-points]').length") == 2
    assert first.problems == second.problems == []
    assert second.requests == [path.as_uri()]


def test_every_control_has_a_name_and_tab_reaches_it_with_a_focus_that_is_seen(browser, tmp_path):
    line = {name: rl_line(1, 2)[name] for name in ("step", "loss", "reward", *PARTS)}
    folder = write_run(tmp_path / "run", [line], samples=[sample(1, 1), sample(2, 2)])
    page = browser.open(write_report(folder).as_uri())
    controls = {"button", "combobox", "spinbutton", "searchbox", "link", "image", "table", "region"}
    names = [(role, name) for role, name in page.named() if role in controls]
    assert {role for role, _ in names} == controls
    assert all(name for _, name in names)
    fields = [name for role, name in names if role in ("combobox", "spinbutton", "searchbox")]
    assert len(fields) == len(set(fields))
    number = page.run(
        "(() => {window.controls = [...document.querySelectorAll("
        "'a, button, input, select, summary, [tabindex]')].filter(e => e.checkVisibility());"
        "window.reached = new Map();"
        "document.addEventListener('focusin', event => reached.set(event.target,"
        "getComputedStyle(event.target).outlineStyle));"
        "return controls.length;})()"
    )
    assert number > 30
    for _ in range(number + 5):  # boxes that scroll are stops, too
        page.press("Tab")
    missed = "controls.filter(control => reached.get(control) !== 'solid').map(c => c.outerHTML)"
    assert page.run(missed) == []


def test_headings_never_skip_a_level(browser, page, folder, tmp_path):
    path = write_comparison([folder, folder], tmp_path / "compare.html")
    for one in (page, browser.open(path.as_uri())):
        levels = one.run("[...document.querySelectorAll('h1, h2, h3, h4')].map(h => +h.tagName[1])")
        assert levels[0] == 1
        assert levels.count(1) == 1
        assert all(after <= before + 1 for before, after in pairwise(levels))


def test_no_word_of_a_chart_is_cut_or_covers_another(page):
    hidden = """[...document.querySelectorAll('.chart > svg')].flatMap(svg => {
      const box = svg.getBoundingClientRect();
      const words = [...svg.querySelectorAll('text')].map(text => text.getBoundingClientRect());
      return words.filter((a, i) => a.left < box.left || a.right > box.right + 1
        || words.some((b, j) => i < j && a.left < b.right && b.left < a.right
          && a.top + 2 < b.bottom && b.top + 2 < a.bottom)).map(() => svg.parentElement.id);
    })"""
    assert page.run(hidden) == []


def test_a_narrow_window_shows_all_without_scrolling_sideways(browser, folder):
    page = browser.open(write_report(folder).as_uri(), width=390)
    assert page.run("document.documentElement.scrollWidth") <= 390


def test_it_prints_in_light_colours_without_its_controls_and_with_nothing_folded(browser, folder):
    page = browser.open(write_report(folder).as_uri(), theme="dark")
    page.run("document.getElementById('theme').click()")
    page.run("document.getElementById('theme').click()")
    folded = "[...document.querySelectorAll('details')].filter(d => !d.open).length"
    page.run(f"addEventListener('beforeprint', () => {{ window.folded = {folded}; }})")
    before = page.run(folded)
    printed = browser.ask("Page.printToPDF", page.session)["data"]
    assert base64.b64decode(printed).startswith(b"%PDF")
    assert page.run("window.folded") == 0
    assert page.run(folded) == before > 20
    browser.ask("Emulation.setEmulatedMedia", page.session, media="print", features=[])
    hidden = (
        "['#filters', 'header nav', '#theme'].map(query =>"
        "getComputedStyle(document.querySelector(query)).display)"
    )
    assert page.run(hidden) == ["none"] * 3
    assert page.run("document.documentElement.dataset.theme") == "dark"
    assert contrast(page.run("getComputedStyle(document.body).color"), "rgb(255, 255, 255)") > 7
    page.run("dispatchEvent(new Event('beforeprint'))")
    cut = (
        "[...document.querySelectorAll('.scroll, pre')].filter(box => box.checkVisibility()"
        "&& getComputedStyle(box).overflow !== 'visible').map(box => box.outerHTML)"
    )
    assert page.run(cut) == []
