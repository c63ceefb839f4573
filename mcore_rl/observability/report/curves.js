// Curves: a picture per plot, both runs in one; a line under the pointer reads the values.

const CHART = { width: 560, height: 240, left: 54, right: 14, top: 8, bottom: 26 };

function curvesSection() {
  const missing = DATA.missing.map((plot) => `${plot.title} (needs ${plot.keys.join(" or ")})`);
  return section("curves", "Curves",
    html("div", { class: "plots" }, DATA.plots.map((plot) => figure(plot)), timeFigures()),
    missing.length ? html("p", {}, `Not drawn, because the run did not log it: ${missing.join("; ")}.`) : null,
    live(otherMetric));
}

/** Return a picture of any metric that was logged. */
function otherMetric() {
  const keys = [...new Set(RUNS.flatMap((run) => Object.keys(run.columns)))].sort();
  const key = keys.includes(state.metric) ? state.metric : "";
  const plot = { title: key, caption: "", keys: [key], draw: "lines", lines: [], alarms: [] };
  const options = [["", "choose"], ...keys.map((name) => [name, name])];
  return [
    html("div", { class: "controls" }, choice("any other metric", "metric", options, key, (metric) => setState({ metric }))),
    key ? html("div", { class: "plots" }, figure(plot)) : null,
  ];
}

function figure(plot) {
  const series = plot.draw === "ranges" ? ranges(plot) : lines(plot);
  return html("figure", {}, html("h3", {}, plot.title), chart(plot, series), html("figcaption", {}, plot.caption));
}

/** Return what is drawn of each key in each run: by color the run where there are two, else the key. */
function lines(plot) {
  const isMixed = new Set(plot.keys.map((key) => key.split("/")[0])).size > 1;
  return RUNS.flatMap((run, r) => plot.keys.filter((key) => run.columns[key]).map((key) => {
    const k = plot.keys.indexOf(key);
    return { name: named(isMixed ? key : key.slice(key.indexOf("/") + 1), r), ...look(r, k), ...run.columns[key] };
  }));
}

/** Return, for keys x/min, x/mean, x/max, a line with a band. */
function ranges(plot) {
  const stems = [...new Set(plot.keys.map((key) => key.slice(0, key.lastIndexOf("/"))))];
  return RUNS.flatMap((run, r) => stems.map((stem, k) => {
    const [low, mean, high] = ["min", "mean", "max"].map((name) => run.columns[`${stem}/${name}`]);
    const line = mean || { steps: [], values: [], smooth: null };
    return { name: named(stem.slice(stem.indexOf("/") + 1), r), ...look(r, k), ...line, low, high };
  })).filter((one) => one.steps.length || one.low || one.high);
}

const named = (name, r) => (IS_PAIR ? `${"AB"[r]} ${name}` : name);
const look = (r, k) => (IS_PAIR ? { color: COLORS[r], dash: DASHES[k % DASHES.length] } : { color: COLORS[k % COLORS.length], dash: "" });

function chart(plot, series) {
  const { width, height, left, right, top, bottom } = CHART;
  const all = series.flatMap((one) => [one, one.low, one.high].filter(Boolean));
  const values = all.flatMap((one) => one.values).filter((value) => value !== null);
  const x = scale(bounds(all.flatMap((one) => one.steps), 0.5), left, width - right);
  const y = yScale(plot, values, height - bottom, top);
  const content = [
    alarmBands(plot, x),
    y.ticks.map((tick) => svg("line", { class: "grid", x1: left, x2: width - right, y1: y(tick), y2: y(tick) })),
    y.ticks.map((tick) => svg("text", { class: "tick", x: left - 6, y: y(tick) + 3.5, "text-anchor": "end" }, short(tick))),
    stepTicks(x).map((tick) => svg("text", { class: "tick", x: x(tick), y: height - 8, "text-anchor": "middle" }, short(tick))),
    plot.lines.filter(([value]) => y.holds(value)).map(([value, label]) => [
      svg("line", { class: "reference", x1: left, x2: width - right, y1: y(value), y2: y(value) }),
      svg("text", { class: "tick", x: width - right, y: y(value) - 4, "text-anchor": "end" }, label)]),
    series.map((one) => strokes(one, x, y)),
  ];
  const cursor = svg("line", { class: "cursor", y1: top, y2: height - bottom, visibility: "hidden" });
  const picture = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": plot.title }, content, cursor);
  const key = legend(series);
  picture.addEventListener("pointermove", (event) => {
    const box = picture.getBoundingClientRect();
    const step = nearest(series, x.invert(((event.clientX - box.left) / box.width) * width));
    if (step === null) return;
    for (const [name, of] of [["x1", x(step)], ["x2", x(step)], ["visibility", "visible"]]) cursor.setAttribute(name, of);
    key.read(step);
  });
  picture.addEventListener("pointerleave", () => {
    cursor.setAttribute("visibility", "hidden");
    key.read(null);
  });
  return [key.element, picture];
}

/** Return a line for each series with its last value, or that at a step. */
function legend(series) {
  const numbers = series.map(() => html("b", {}));
  const where = html("span", { class: "where" });
  const read = (step) => {
    where.textContent = step === null ? "" : `step ${step}`;
    series.forEach((one, i) => {
      const at = step === null ? one.values.length - 1 : closest(one.steps, step);
      const value = at >= 0 ? one.values[at] : null;
      numbers[i].textContent = value === null || value === undefined ? "" : short(value);
    });
  };
  read(null);
  const entries = series.map((one, i) => html("span", {},
    svg("svg", { viewBox: "0 0 18 8", class: "swatch" },
      svg("line", { x1: 0, x2: 18, y1: 4, y2: 4, stroke: one.color, "stroke-width": 2.5, "stroke-dasharray": one.dash })),
    one.name, " ", numbers[i]));
  return { element: html("div", { class: "legend" }, entries, where), read };
}

function strokes(one, x, y) {
  const stroke = { stroke: one.color, fill: "none", "stroke-dasharray": one.dash };
  const parts = [];
  if (one.low && one.high) {
    const edge = [...points(one.high, x, y), ...points(one.low, x, y).reverse()].filter(Boolean);
    parts.push(svg("path", { d: path(edge), fill: one.color, opacity: 0.13 }));
  }
  for (const side of [one.low, one.high].filter(Boolean)) {
    parts.push(svg("path", { d: path(points(side, x, y)), ...stroke, opacity: 0.45, "stroke-width": 0.8 }));
  }
  const main = points(one, x, y);
  if (one.smooth) {
    parts.push(svg("path", { d: path(main), ...stroke, opacity: 0.3, "stroke-width": 1 }));
    parts.push(svg("path", { d: path(points(one.smooth, x, y)), ...stroke, "stroke-width": 1.9 }));
  } else {
    parts.push(svg("path", { d: path(main), ...stroke, "stroke-width": 1.9 }));
  }
  if (main.length <= 40) {
    parts.push(main.filter(Boolean).map(([cx, cy]) => svg("circle", { cx, cy, r: 2.6, fill: one.color })));
  }
  return parts;
}

/** Return the places of a series; null where it has no value that can be drawn. */
function points(one, x, y) {
  return one.steps.map((step, i) => (one.values[i] !== null && y.holds(one.values[i]) ? [x(step), y(one.values[i])] : null));
}

function path(places) {
  let isOpen = false;
  return places.map((place) => {
    const word = place === null ? "" : `${isOpen ? "L" : "M"}${place[0].toFixed(1)} ${place[1].toFixed(1)}`;
    isOpen = place !== null;
    return word;
  }).join("");
}

function alarmBands(plot, x) {
  const { top, height, bottom } = CHART;
  return RUNS.flatMap((run) => DATA.alarms.flatMap((alarm, i) =>
    (plot.alarms.includes(alarm.title) && run.alarms[i].ranges) || []).map(([first, last]) =>
    svg("rect", { class: "alarm", x: x(first - 0.5), width: Math.max(1.5, x(last + 0.5) - x(first - 0.5)), y: top, height: height - top - bottom })));
}

function bounds(values, margin) {
  const low = values.reduce((a, b) => Math.min(a, b), Infinity);
  const high = values.reduce((a, b) => Math.max(a, b), -Infinity);
  return low <= high ? [low - margin, high + margin] : [0, 1];
}

function scale([low, high], from, to) {
  const at = (value) => from + ((value - low) / (high - low)) * (to - from);
  at.invert = (place) => low + ((place - from) / (to - from)) * (high - low);
  at.limits = [low, high];
  at.holds = () => true;
  return at;
}

/** Return the scale of the values with its ticks; logarithmic where the plot asks for it and they lie
    far enough apart. */
function yScale(plot, values, from, to) {
  const references = plot.is_log ? plot.lines.map(([value]) => value) : [];
  const positive = [...values, ...references].filter((value) => value > 0);
  const [least, most] = bounds(positive, 0);
  if (plot.is_log && positive.length && most > 4 * least) {
    const inner = scale([Math.log10(least) - 0.12, Math.log10(most) + 0.12], from, to);
    const at = (value) => inner(Math.log10(value));
    at.holds = (value) => value > 0;
    at.ticks = logTicks(...inner.limits);
    return at;
  }
  let [low, high] = bounds(values, 0);
  if (plot.is_share && low >= 0 && high <= 1) [low, high] = [-0.02, 1.02];
  else if (low === high) [low, high] = [low - (Math.abs(low) * 0.1 || 1), high + (Math.abs(high) * 0.1 || 1)];
  else [low, high] = [low - 0.06 * (high - low), high + 0.06 * (high - low)];
  const at = scale([low, high], from, to);
  at.ticks = ticks(low, high, 5);
  return at;
}

function ticks(low, high, about) {
  const rough = (high - low) / about;
  const unit = 10 ** Math.floor(Math.log10(rough));
  const size = unit * [1, 2, 5, 10].find((factor) => factor * unit >= rough * 0.999);
  const found = [];
  for (let i = Math.ceil(low / size); i * size <= high; i += 1) found.push(Number((i * size).toPrecision(12)));
  return found;
}

function logTicks(low, high) {
  const factors = high - low < 2 ? [1, 2, 5] : [1];
  const every = Math.ceil((high - low) / 7);
  const found = [];
  for (let power = Math.floor(low); power <= high; power += every) {
    for (const factor of factors) found.push(Number(`${factor}e${power}`));
  }
  return found.filter((value) => Math.log10(value) >= low && Math.log10(value) <= high);
}

const stepTicks = (x) => ticks(...x.limits, 7).filter(Number.isInteger);

/** Return the position of the step that is closest in a list in order. */
function closest(steps, step) {
  let low = 0;
  let high = steps.length - 1;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (steps[middle] < step) low = middle + 1;
    else high = middle;
  }
  return low > 0 && step - steps[low - 1] <= steps[low] - step ? low - 1 : low;
}

function nearest(series, step) {
  const found = series.filter((one) => one.steps.length).map((one) => one.steps[closest(one.steps, step)]);
  return found.length ? found.reduce((a, b) => (Math.abs(b - step) < Math.abs(a - step) ? b : a)) : null;
}
