"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  for (const chart of Object.values(data.charts)) for (const series of chart.series) series.s = data.steps[series.s];
  const find = (id) => document.getElementById(id);

  // Texts of models become text nodes and nothing else: no innerHTML anywhere.
  const make = (tag, text, cls) => {
    const element = document.createElement(tag);
    if (text !== undefined && text !== null) element.textContent = text;
    if (cls) element.className = cls;
    return element;
  };

  // Theme: the system's, until the button is pressed.
  const root = document.documentElement;
  const isDark = () =>
    root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  const label = () => {
    find("theme").textContent = isDark() ? "Light" : "Dark";
    find("theme").setAttribute("aria-pressed", String(isDark()));
  };
  find("theme").addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    label();
  });
  label();

  // Paper has no pointer: what is folded is printed open.
  let unfolded = [];
  addEventListener("beforeprint", () => {
    unfolded = [...document.querySelectorAll("details:not([open])")];
    for (const details of unfolded) details.open = true;
  });
  addEventListener("afterprint", () => {
    for (const details of unfolded) details.open = false;
    unfolded = [];
  });

  // Charts: one step under the pointer or the arrow keys, shown in all of them.
  const short = (value, share) => {
    if (share) return `${Number((value * 100).toPrecision(3))} %`;
    const size = Math.abs(value);
    if (value === 0 || (size >= 1e-3 && size < 1e7)) return Number(value.toPrecision(4)).toLocaleString("en");
    return value.toExponential(2);
  };
  const nearest = (steps, step) => {
    let low = 0;
    let high = steps.length - 1;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (steps[middle] < step) low = middle + 1;
      else high = middle;
    }
    return low > 0 && step - steps[low - 1] <= steps[low] - step ? low - 1 : low;
  };
  const figures = [...document.querySelectorAll(".chart")].map((figure) => ({
    figure,
    svg: figure.querySelector("svg"),
    cursor: figure.querySelector(".cursor"),
    readout: figure.querySelector(".readout"),
    chart: data.charts[figure.dataset.key],
  }));
  const show = (step) => {
    for (const { cursor, readout, chart } of figures) {
      const [first, last] = chart.x;
      const place = data.left + ((step - first) / (last - first)) * (data.right - data.left);
      cursor.setAttribute("transform", `translate(${place} 0)`);
      cursor.setAttribute("visibility", step < first || step > last ? "hidden" : "visible");
      const many = chart.series.length > 1;
      const texts = chart.series.map((series) => {
        const at = nearest(series.s, step);
        const where = series.s[at] === step ? "" : ` (step ${series.s[at]})`;
        return `${many ? series.label + " " : ""}${short(series.v[at], chart.share)}${where}`;
      });
      readout.textContent = `step ${step}: ${texts.join(", ")}`;
    }
  };
  const hide = () => {
    for (const { cursor, readout } of figures) {
      cursor.setAttribute("visibility", "hidden");
      readout.textContent = "";
    }
  };
  for (const { figure, svg, readout, chart } of figures) {
    const steps = [...new Set(chart.series.flatMap((series) => series.s))].sort((a, b) => a - b);
    let at = steps.length - 1;
    svg.addEventListener("pointermove", (event) => {
      const box = svg.getBoundingClientRect();
      const x = ((event.clientX - box.left) / box.width) * svg.viewBox.baseVal.width;
      const share = (x - data.left) / (data.right - data.left);
      at = nearest(steps, chart.x[0] + share * (chart.x[1] - chart.x[0]));
      show(steps[at]);
    });
    svg.addEventListener("pointerleave", hide);
    svg.addEventListener("focus", () => {
      readout.setAttribute("aria-live", "polite");
      show(steps[at]);
    });
    svg.addEventListener("blur", () => {
      readout.setAttribute("aria-live", "off");
      hide();
    });
    svg.addEventListener("keydown", (event) => {
      const moved = { ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: steps.length - 1 }[event.key];
      if (moved === undefined) return;
      event.preventDefault();
      at = Math.min(Math.max(moved, 0), steps.length - 1);
      show(steps[at]);
    });
    const details = figure.querySelector(".numbers");
    details.addEventListener("toggle", () => {
      if (!details.open || unfolded.includes(details) || details.querySelector(".all")) return;
      const table = make("table", null, "all");
      const head = table.createTHead().insertRow();
      for (const text of ["step", ...chart.series.map((series) => series.label)]) {
        const cell = make("th", text);
        cell.scope = "col";
        head.append(cell);
      }
      const body = table.createTBody();
      const values = chart.series.map((series) => new Map(series.s.map((step, i) => [step, series.v[i]])));
      for (const step of steps) {
        const row = body.insertRow();
        for (const value of [step, ...values.map((found) => found.get(step) ?? "")]) row.insertCell().textContent = value;
      }
      details.querySelector(".scroll").append(table);
    });
  }

  // Samples.
  if (!data.samples || !data.samples.length) return;
  const PAGE = 20;
  const ENDS = { stop: "ended by itself", length: "cut off at the length limit", repetition: "cut off in a loop" };
  const SIDES = ["chosen", "rejected"]; // of a held-out pair
  const BOUNDS = [-10, -50, -100, -230, -460]; // hundredths of a nat: 90 %, 61 %, 37 %, 10 %, 1 %
  const level = (logp) => BOUNDS.filter((bound) => logp < bound).length;
  const joined = (sample) => (sample.x !== undefined ? sample.x : sample.t.join(""));
  const nats = (logp) => `log-prob ${(logp / 100).toFixed(2)}, probability ${short(Math.exp(logp / 100), true)}`;
  const texts = data.samples.map((sample) => `${data.prompts[sample.p]}\n${joined(sample)}`.toLowerCase());

  const completion = (sample) => {
    const pre = make("pre", null, "tokens");
    if (!sample.t) {
      pre.textContent = sample.x;
    } else {
      sample.t.forEach((text, i) => {
        if (text === null) return pre.append(make("span", " […] ", "cut"));
        const isEnd = sample.e === "stop" && i === sample.t.length - 1;
        const token = make("span", text || "∅", `p${level(sample.l[i])}${isEnd ? " end" : ""}`);
        token.dataset.l = sample.l[i];
        pre.append(token);
      });
    }
    if (sample.e !== "stop") pre.append(make("span", ` ▮ ${ENDS[sample.e] || sample.e}`, "cut"));
    return pre;
  };
  const unlikely = (sample) => {
    const details = make("details");
    details.append(make("summary", "Log-probs, least likely first"));
    const order = sample.t.map((_, i) => i).filter((i) => sample.t[i] !== null);
    order.sort((a, b) => sample.l[a] - sample.l[b]);
    const list = make("ol");
    const add = (i) => list.append(make("li", `“${sample.t[i]}”, token ${i + 1}: ${nats(sample.l[i])}`));
    order.slice(0, 10).forEach(add);
    details.append(list);
    details.addEventListener("toggle", () => {
      if (details.open && !unfolded.includes(details)) order.splice(0).slice(10).forEach(add);
    });
    return details;
  };
  const card = (sample, withPrompt, heading) => {
    const article = make("article", null, "sample");
    const known = [`step ${sample.s}`];
    const was = (i) => (sample.b ? ` (${sample.b[i] === null ? "none" : short(sample.b[i])} before training)` : "");
    if (sample.m !== undefined) known.push(`score ${sample.r === null ? "none" : short(sample.r)}${was(0)}`, `margin ${short(sample.m)}${was(1)}`);
    else if (sample.r !== null) known.push(`reward ${short(sample.r)}`);
    else if (data.parts.length) known.push("no reward");
    if (sample.g !== undefined) known.push(`log-ratio ${sample.g > 0 ? "+" : ""}${short(sample.g)} nats`);
    known.push(`${sample.n} tokens`, ENDS[sample.e] || sample.e);
    if (sample.c) known.push(SIDES.includes(sample.c) ? `held out, ${sample.c}` : sample.c);
    if (sample.k) known.push(`${sample.k} pair`);
    article.append(make(heading, known.join(", "), "title"));
    const list = make("dl");
    data.parts.forEach((part, i) => {
      const value = sample.v[i];
      list.append(make("dt", part), make("dd", value === null ? "none" : short(value)), make("dd", (sample.w && sample.w[i]) || ""));
    });
    article.append(list);
    if (withPrompt) {
      const details = make("details");
      details.append(make("summary", `Prompt: …${data.prompts[sample.p].slice(-80)}`), make("pre", data.prompts[sample.p], "prompt"));
      article.append(details);
    }
    article.append(completion(sample));
    if (sample.t) article.append(unlikely(sample));
    return article;
  };

  const form = find("filters");
  const chooser = form.elements.prompt;
  const counts = new Map();
  for (const sample of data.samples) counts.set(sample.p, (counts.get(sample.p) || new Set()).add(sample.s));
  [...counts.keys()]
    .sort((a, b) => counts.get(b).size - counts.get(a).size)
    .forEach((p) => {
      const option = make("option", `${counts.get(p).size} × …${data.prompts[p].slice(-60)}`);
      option.value = p;
      chooser.append(option);
    });

  const within = (value, low, high) =>
    (low === "" || (value !== null && value >= Number(low))) && (high === "" || (value !== null && value <= Number(high)));
  const chosen = () => {
    const of = (name) => form.elements[name].value;
    const valueOf = (sample) => (of("part") === "r" ? sample.r : sample.v[Number(of("part"))]);
    const words = of("text").toLowerCase();
    const kept = data.samples
      .map((sample, i) => i)
      .filter((i) => {
        const sample = data.samples[i];
        const kind = sample.c === "held out" || SIDES.includes(sample.c) ? "held out" : "train";
        return (
          within(sample.s, of("step0"), of("step1")) &&
          within(valueOf(sample), of("value0"), of("value1")) &&
          within(sample.n, of("length0"), of("length1")) &&
          (of("kind") === "" || of("kind") === kind) &&
          (of("prompt") === "" || sample.p === Number(of("prompt"))) &&
          (words === "" || texts[i].includes(words))
        );
      });
    const value = (i) => data.samples[i].m ?? valueOf(data.samples[i]) ?? -Infinity; // pairs by their margin
    const step = (i) => data.samples[i].s;
    // The same shuffle at each visit: a hash of the place.
    const shuffled = (i) => Math.imul(i + 1, 2654435761) >>> 0;
    const orders = {
      new: (a, b) => step(b) - step(a),
      old: (a, b) => step(a) - step(b),
      best: (a, b) => value(b) - value(a),
      worst: (a, b) => value(a) - value(b),
      random: (a, b) => shuffled(a) - shuffled(b),
    };
    return kept.sort(of("prompt") === "" ? orders[of("order")] : orders.old);
  };

  let shown = PAGE;
  const render = () => {
    const kept = chosen();
    const list = find("list");
    const across = form.elements.prompt.value !== "";
    list.replaceChildren();
    list.className = across ? "samples across" : "samples";
    if (across && kept.length) list.before(promptOf(data.samples[kept[0]].p));
    else promptOf(null);
    kept.slice(0, across ? kept.length : shown).forEach((i) => list.append(card(data.samples[i], !across, "h3")));
    const isCut = !across && kept.length > shown;
    find("count").textContent = `${kept.length} of ${data.samples.length} samples${isCut ? `, the first ${shown} shown` : ""}`;
    find("more").hidden = !isCut;
  };
  let shownPrompt = null;
  const promptOf = (p) => {
    if (shownPrompt) shownPrompt.remove();
    shownPrompt = p === null ? null : make("pre", data.prompts[p], "prompt");
    return shownPrompt;
  };
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("input", () => {
    shown = PAGE;
    render();
  });
  form.addEventListener("reset", () => setTimeout(render));
  find("more").addEventListener("click", () => {
    shown += PAGE;
    render();
  });
  const furthest = find("disagreeing");
  if (furthest) for (const i of data.disagreeing || []) furthest.append(card(data.samples[i], true, "h4"));
  render();

  // The number of the token under the pointer.
  const tip = find("tip");
  document.addEventListener("pointermove", (event) => {
    const token = event.target.closest ? event.target.closest(".tokens [data-l]") : null;
    tip.hidden = !token;
    if (!token) return;
    tip.textContent = nats(Number(token.dataset.l));
    tip.style.left = `${Math.min(event.clientX + 12, innerWidth - 260)}px`;
    tip.style.top = `${event.clientY + 16}px`;
  });
})();
