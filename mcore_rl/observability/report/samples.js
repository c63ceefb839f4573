// Samples: filters, search, and the response token by token in the color of what was measured.

const PAGE = 20;
const COLORINGS = [["difference", "|logprob difference|"], ["advantage", "advantage"], ["logprob", "engine's logprob"], ["version", "weights that drew it"], ["none", "nothing"]];
const VERSION_COLORS = ["37,99,235", "234,88,12", "22,163,74", "147,51,234"];

function samplesSection() {
  const results = html("div", {});
  let most = PAGE;
  const redraw = () => results.replaceChildren(...found(most, () => { most += PAGE; redraw(); }));
  listeners.push(() => { most = PAGE; redraw(); });
  redraw();
  return section("samples", "Samples", live(sampleControls), results);
}

function sampleControls() {
  const { samples } = RUNS[chosenRun()];
  if (!samples.shown.length) return html("p", {}, samples.is_there ? `${DATA.files.samples} has no samples.` : `The run has no ${DATA.files.samples}.`);
  const distinct = (key) => [...new Set(samples.shown.map((sample) => shown(sample[key])))].filter(Boolean);
  const field = (label, key, type, size) => html("label", {}, label, html("input", {
    name: key, type, size, step: "any", value: state[key] || "", onchange: (event) => setState({ [key]: event.target.value }) }));
  const any = (values) => [["", "all"], ...values.map((value) => [value, value])];
  return html("div", { class: "controls" }, runChoice(),
    choice("step", "step", any(distinct("step")), state.step || "", (step) => setState({ step })),
    choice("split", "split", any(distinct("split")), state.split || "", (split) => setState({ split })),
    field("reward from", "min", "number", 6), field("to", "max", "number", 6),
    field("search", "search", "search", 24),
    choice("color by", "color", COLORINGS, coloring(), (color) => setState({ color })));
}

const coloring = () => (COLORINGS.some(([name]) => name === state.color) ? state.color : "difference");

/** Return the samples that pass the filters, newest step first. */
function matchingSamples() {
  const words = (state.search || "").toLowerCase();
  const [low, high] = [stateNumber("min", -Infinity), stateNumber("max", Infinity)];
  const inText = (sample) => [sample.prompt, responseOf(sample), sample.ground_truth, sample.answer, sample.uid].some(
    (text) => shown(text).toLowerCase().includes(words));
  const bounded = state.min !== undefined || state.max !== undefined;
  return RUNS[chosenRun()].samples.shown.filter((sample) =>
    (state.step === undefined || shown(sample.step) === state.step)
    && (state.split === undefined || shown(sample.split) === state.split)
    && (!bounded || (typeof sample.reward === "number" && sample.reward >= low && sample.reward <= high))
    && (!words || inText(sample))).reverse();
}

const areAll = (sample) => sample.tokens !== null && sample.tokens.texts.length >= (sample.num_tokens || 0);
const responseOf = (sample) => (areAll(sample) ? sample.tokens.texts.join("") : sample.response);

function found(most, more) {
  const { samples } = RUNS[chosenRun()];
  if (!samples.shown.length) return [];
  const all = matchingSamples();
  const left = samples.num - samples.shown.length;
  return [
    html("p", { id: "count" }, `${all.length} of ${samples.shown.length} samples match.`,
      left ? ` ${left} more are in ${DATA.files.samples} only, to keep this file small.` : "", scaleLegend()),
    ...all.slice(0, most).map(card),
    all.length > most ? html("button", { onclick: more }, `Show ${Math.min(PAGE, all.length - most)} more`) : null,
  ].filter(Boolean);
}

function card(sample) {
  const status = sample.reward_status && sample.reward_status !== "scored" ? ` (${shown(sample.reward_status)})` : "";
  const facts = [
    ["step", sample.step], ["", sample.split], ["", sample.uid], ["sample", sample.index],
    ["reward", typeof sample.reward === "number" ? short(sample.reward) + status : sample.reward],
    ...Object.entries(sample.reward_parts || {}).map(([name, value]) => [name, short(value)]),
    ["answer", sample.answer], ["ground truth", sample.ground_truth], ["ended by", sample.finish_reason],
    ["tokens", sample.num_tokens], ["weights", spans(sample).map(([version, from, to]) => (spans(sample).length > 1 ? `${version} (${from}–${to - 1})` : version)).join(", ")],
  ].filter(([, value]) => shown(value) !== "");
  return html("article", { class: "sample" },
    html("div", { class: "facts" }, facts.map(([name, value]) => html("span", {}, name ? `${name} ` : "", html("b", {}, shown(value))))),
    html("div", { class: "prompt" }, shown(sample.prompt)),
    html("div", { class: "response" }, response(sample)),
    notes(sample).map((note) => html("p", { class: "note" }, note)));
}

function spans(sample) {
  const isSpan = (span) => Array.isArray(span) && span.length === 3 && span.every(Number.isFinite);
  return Array.isArray(sample.versions) ? sample.versions.filter(isSpan) : [];
}

function response(sample) {
  if (sample.tokens === null) return shown(sample.response);
  const measured = measures(sample);
  return sample.tokens.texts.map((text, i) => {
    const color = tint(measured, i);
    return html("span", { class: "token", title: reading(measured, i), css: color ? { background: color } : {} }, text);
  });
}

function notes(sample) {
  const { tokens } = sample;
  if (tokens === null) return [];
  const found = [];
  if (!areAll(sample)) {
    found.push(`The first ${tokens.texts.length} of ${shown(sample.num_tokens)} tokens. The whole response: ${shown(sample.response)}`);
  }
  if (coloring() === "difference" && tokens.logprob_diffs === null) {
    found.push(sample.split === "val"
      ? "The difference is not measured in validations."
      : "The difference was not measured for single tokens: a step with one update needs no pass for it.");
  }
  if (coloring() === "advantage" && tokens.advantages === null) found.push("There are no advantages in validations.");
  return found;
}

/** Return what is known of each token, one list per measure or null. */
function measures(sample) {
  const { tokens } = sample;
  const versions = [];
  for (const [version, from, to] of spans(sample)) for (let i = from; i < Math.min(to, tokens.texts.length); i += 1) versions[i] = version;
  return {
    logprob: tokens.rollout_logprobs,
    difference: tokens.logprob_diffs,
    advantage: tokens.advantages && tokens.advantages.values.flatMap((value, i) => new Array(tokens.advantages.counts[i]).fill(value)),
    version: versions,
  };
}

function reading(measured, i) {
  const { logprob, difference, advantage, version } = measured;
  return [
    `engine's logprob ${short(logprob[i])}`,
    difference && `trainer's ${short(logprob[i] + difference[i])}, difference ${short(difference[i])}`,
    advantage && advantage[i] !== undefined && `advantage ${short(advantage[i])}`,
    version[i] !== undefined && `weights ${version[i]}`,
  ].filter(Boolean).join("\n");
}

const LARGEST_ADVANTAGE = RUNS.map((run) => run.samples.shown.flatMap((sample) => (sample.tokens && sample.tokens.advantages ? sample.tokens.advantages.values : []))
  .reduce((most, value) => Math.max(most, Math.abs(value)), 0) || 1);
const OLDEST = (version) => VERSION_COLORS[((version % 4) + 4) % 4];

/** Return the color of a token; null for none. */
function tint(measured, i) {
  const name = coloring();
  const value = name === "none" || !measured[name] ? undefined : measured[name][i];
  if (value === undefined) return null;
  if (name === "version") return `rgba(${OLDEST(value)},0.22)`;
  if (name === "logprob") return `rgba(147,51,234,${clamp(-value / 5) * 0.7})`;
  if (name === "difference") return `rgba(220,38,38,${clamp((Math.log10(Math.abs(value) + 1e-12) + 4) / 4) * 0.8})`;
  const strength = clamp(Math.abs(value) / LARGEST_ADVANTAGE[chosenRun()]) * 0.65;
  return value >= 0 ? `rgba(22,163,74,${strength})` : `rgba(234,88,12,${strength})`;
}

const clamp = (value) => Math.min(1, Math.max(0, value));

/** Say what the colors mean. */
function scaleLegend() {
  const box = (color, text) => html("span", {}, html("i", { class: "dot", css: { background: color } }), text);
  const largest = short(LARGEST_ADVANTAGE[chosenRun()]);
  const entries = {
    difference: [["rgba(220,38,38,0.1)", "below 3e-4"], ["rgba(220,38,38,0.4)", "0.01"], ["rgba(220,38,38,0.8)", "1 and more; under older weights it includes what was learnt since"]],
    advantage: [["rgba(22,163,74,0.65)", `up to ${largest}`], ["rgba(234,88,12,0.65)", `down to -${largest}`]],
    logprob: [["rgba(147,51,234,0.14)", "-1"], ["rgba(147,51,234,0.7)", "-5 and less"]],
    version: VERSION_COLORS.map((color, i) => [`rgba(${color},0.22)`, i ? `+${i}` : "version, modulo 4: 0"]),
    none: [],
  }[coloring()];
  return html("span", { class: "legend inline" }, entries.map(([color, text]) => box(color, text)));
}
