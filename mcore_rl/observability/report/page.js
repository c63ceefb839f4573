// What all sections use: the data, elements, the state in the address, numbers as text.
// Texts of the run become text nodes; nothing is ever parsed as HTML.

const DATA = JSON.parse(document.getElementById("data").textContent);
const RUNS = DATA.runs;
const IS_PAIR = RUNS.length > 1;
const NAMES = RUNS.map((run, i) => (IS_PAIR ? `${"AB"[i]}: ${run.title}` : run.title));
const COLORS = ["#2563eb", "#ea580c", "#16a34a", "#9333ea", "#dc2626", "#0891b2", "#ca8a04", "#db2777"];
const DASHES = ["", "5 3", "2 2", "8 3 2 3"];

/** Return an element; attributes beginning with "on" are listeners, `css` sets single properties. */
function make(namespace, tag, attributes, children) {
  const element = document.createElementNS(namespace, tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "css") for (const [key, of] of Object.entries(value)) element.style.setProperty(key, of);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined));
  return element;
}

const html = (tag, attributes, ...children) => make("http://www.w3.org/1999/xhtml", tag, attributes, children);
const svg = (tag, attributes, ...children) => make("http://www.w3.org/2000/svg", tag, attributes, children);

/** Return any value of the run as text. */
function shown(value) {
  if (value === null || value === undefined) return "";
  return typeof value === "string" ? value : JSON.stringify(value);
}

/** Return a number in few digits: "0.0012", "1.2e-7", "12,345". */
function short(value) {
  if (typeof value !== "number") return shown(value);
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e6)) return value.toExponential(1).replace("e+", "e").replace(".0e", "e");
  if (size >= 1000) return Math.round(value).toLocaleString("en-US");
  return String(Number(value.toPrecision(4)));
}

function seconds(value) {
  return value >= 100 ? `${value.toFixed(0)} s` : value >= 1 ? `${value.toFixed(1)} s` : `${value.toFixed(2)} s`;
}

function section(id, title, ...children) {
  return html("section", { id }, html("h2", {}, title), ...children);
}

function table(css, header, rows) {
  return html("table", { class: css },
    html("thead", {}, html("tr", {}, header.map((name) => html("th", {}, name)))),
    html("tbody", {}, rows.map((row) => html("tr", {}, row.map((cell) => html("td", {}, cell))))));
}

/** Return a choice: [[value, text], ...]; `change` is given the new value. */
function choice(label, name, options, value, change) {
  const list = html("select", { name, onchange: (event) => change(event.target.value) },
    options.map(([of, text]) => html("option", { value: of, selected: String(of) === String(value) }, text)));
  return html("label", {}, label, list);
}

// The state stands in the address as "#step=3&search=foo", so that a view can be sent on. A plain
// "#samples" leads to a section and leaves the state alone.
const state = {};
const listeners = [];

function readState() {
  const hash = location.hash.slice(1);
  if (!hash.includes("=")) return false;
  for (const key of Object.keys(state)) delete state[key];
  for (const [key, value] of new URLSearchParams(hash)) state[key] = value;
  return true;
}

function setState(changes) {
  Object.assign(state, changes);
  for (const key of Object.keys(state)) if (state[key] === "") delete state[key];
  history.replaceState(null, "", `#${new URLSearchParams(state)}`);
  listeners.forEach((listener) => listener());
}

function stateNumber(key, otherwise) {
  return state[key] === undefined || Number.isNaN(Number(state[key])) ? otherwise : Number(state[key]);
}

/** Return the run that sections with one run at a time show. */
function chosenRun() {
  return Math.min(RUNS.length - 1, Math.max(0, Math.trunc(stateNumber("run", 0))));
}

function runChoice() {
  return IS_PAIR ? choice("run", "run", NAMES.map((name, i) => [i, name]), chosenRun(), (run) => setState({ run })) : null;
}

/** Return an element that is drawn anew whenever the state changes. */
function live(draw) {
  const place = html("div", {});
  const redraw = () => place.replaceChildren(...[draw()].flat().filter(Boolean));
  listeners.push(redraw);
  redraw();
  return place;
}
