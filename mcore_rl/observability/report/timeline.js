// Timeline: the stages of the last steps as bars, and how long the trainer and the engines idled.

const STAGE_COLORS = {
  rollout: "#2563eb", reward: "#ca8a04", old_logprobs: "#86efac", values: "#4ade80", train_critic: "#15803d",
  train: "#16a34a", weight_sync: "#9333ea", eval: "#0891b2", checkpoint: "#db2777", other: "#cbd5e1",
};
const stageColor = (stage) => STAGE_COLORS[stage] || "#ea580c";
const sum = (values) => values.reduce((a, b) => a + b, 0);

function timelineSection() {
  return section("timeline", "Timeline", live(() => {
    const rows = RUNS[chosenRun()].timeline.rows;
    if (!rows.length) return html("p", {}, "The run logged no times.");
    const last = Math.max(1, Math.trunc(stateNumber("last", 25)));
    const chosen = rows.slice(-last);
    const sizes = [...new Set([10, 25, 50, 100, 200, last])].sort((a, b) => a - b);
    return [
      html("div", { class: "controls" }, runChoice(),
        choice("show the last", "last", sizes.map((size) => [size, `${size} steps`]), last, (size) => setState({ last: size }))),
      waiting(chosen),
      stageLegend(chosen),
      gantt(chosen),
    ];
  }));
}

/** Say in words who waited for whom over these steps. */
function waiting(rows) {
  const known = rows.filter((row) => row.engines_busy_s !== null && row.trainer_busy_s !== null);
  if (!known.length) return html("p", {}, "Who was busy was not measured in these steps.");
  const total = sum(known.map((row) => row.seconds));
  const trainer = sum(known.map((row) => row.trainer_busy_s));
  const engines = sum(known.map((row) => row.engines_busy_s));
  const waits = {};
  for (const row of known) for (const [what, of] of Object.entries(row.waits)) waits[what] = (waits[what] || 0) + of;
  const longest = Object.entries(waits).sort((a, b) => b[1] - a[1]).filter(([, of]) => of >= 0.01 * total);
  const percent = (part) => `${Math.round((100 * part) / total)} %`;
  const overlap = Math.max(0, trainer + engines - total);
  const who = trainer > engines ? "The engines idled longer than the trainer." : "The trainer idled longer than the engines.";
  return html("ul", { class: "prose", id: "waiting" },
    html("li", {}, html("b", {}, `Trainer: busy ${percent(trainer)}`), ` of ${seconds(total)}. It waited for `,
      longest.map(([what, of]) => `${what} ${seconds(of)}`).join(", ") || "nothing", "."),
    html("li", {}, html("b", {}, `Engines: busy ${percent(engines)}`), `, without requests for ${seconds(Math.max(0, total - engines))}.`),
    html("li", {}, `Both were busy at once for at least ${percent(overlap)} of the time. ${who}`));
}

function stageLegend(rows) {
  const names = [...new Set(rows.flatMap((row) => Object.keys(row.stages)))];
  const total = sum(rows.map((row) => row.seconds));
  const part = (name) => sum(rows.map((row) => row.stages[name] || 0)) / total;
  return html("div", { class: "legend" }, names.map((name) => html("span", {},
    html("i", { class: "dot", css: { background: stageColor(name) } }), name, " ", html("b", {}, `${(100 * part(name)).toFixed(0)} %`))));
}

function gantt(rows) {
  const longest = Math.max(...rows.map((row) => row.seconds));
  const bars = [...rows].reverse().map((row) => {
    const width = (of) => ({ width: `${(100 * of) / longest}%` });
    const stages = Object.entries(row.stages).filter(([, of]) => of > 0).map(([stage, of]) =>
      html("i", { css: { ...width(of), background: stageColor(stage) }, title: `${stage} ${seconds(of)}` }));
    const busy = (css, of) => (of === null ? null : html("div", { class: `busy ${css}` },
      html("i", { css: width(Math.min(of, row.seconds)), title: `busy ${seconds(of)}` }),
      html("i", { class: "idle", css: width(Math.max(0, row.seconds - of)), title: `idle ${seconds(Math.max(0, row.seconds - of))}` })));
    const idle = (of) => (of === null ? "-" : seconds(Math.max(0, row.seconds - of)));
    const most = Object.entries(row.waits).sort((a, b) => b[1] - a[1])[0];
    return [String(row.step),
      html("div", { class: "bars" }, html("div", { class: "stages" }, stages), busy("engines", row.engines_busy_s), busy("trainer", row.trainer_busy_s)),
      seconds(row.seconds), idle(row.trainer_busy_s), most && most[1] > 0 ? `${most[0]} ${seconds(most[1])}` : "-", idle(row.engines_busy_s)];
  });
  const header = ["step", html("span", {}, "stages; below: ", html("i", { class: "dot engines" }), "engines busy, ",
    html("i", { class: "dot trainer" }), "trainer busy"), "time", "trainer idle", "mostly for", "engines idle"];
  return table("gantt", header, bars);
}

/** Return the stages of all steps as a stack, a picture per run. */
function timeFigures() {
  return RUNS.map((run, r) => {
    const rows = run.timeline.stretches;
    if (!rows.length) return null;
    const { width, height, left, right, top, bottom } = CHART;
    const x = scale([rows[0].first - 0.5, rows[rows.length - 1].last + 0.5], left, width - right);
    const heights = rows.map((row) => sum(Object.values(row.stages))).sort((a, b) => a - b);
    const high = Math.min(heights[heights.length - 1], 2 * heights[Math.floor(0.9 * (heights.length - 1))]) * 1.05 || 1;
    const y = scale([0, high], height - bottom, top);
    const paths = {};
    rows.forEach((row) => {
      let below = 0;
      const [from, to] = [x(row.first - 0.5).toFixed(1), x(row.last + 0.5).toFixed(1)];
      for (const [stage, of] of Object.entries(row.stages)) {
        const [low, up] = [y(Math.min(high, below)).toFixed(1), y(Math.min(high, below + of)).toFixed(1)];
        paths[stage] = `${paths[stage] || ""}M${from} ${low}V${up}H${to}V${low}Z`;
        below += of;
      }
    });
    const yTicks = ticks(0, high, 5);
    const names = Object.keys(paths);
    return html("figure", {}, html("h3", {}, IS_PAIR ? `Time per step (seconds), ${NAMES[r]}` : "Time per step (seconds)"),
      html("div", { class: "legend" }, names.map((name) => html("span", {}, html("i", { class: "dot", css: { background: stageColor(name) } }), name))),
      svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": "Time per step" },
        yTicks.map((tick) => svg("line", { class: "grid", x1: left, x2: width - right, y1: y(tick), y2: y(tick) })),
        yTicks.map((tick) => svg("text", { class: "tick", x: left - 6, y: y(tick) + 3.5, "text-anchor": "end" }, short(tick))),
        stepTicks(x).map((tick) => svg("text", { class: "tick", x: x(tick), y: height - 8, "text-anchor": "middle" }, short(tick))),
        names.map((stage) => svg("path", { d: paths[stage], fill: stageColor(stage) }))),
      html("figcaption", {}, "Wall time of each stage, stacked; single steps that took far longer are cut off. The time of a checkpoint is that of the step after it."));
  });
}
