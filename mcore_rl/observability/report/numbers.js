// Numbers: the cards at the top, the table, memory and configuration.

function cards() {
  return RUNS.map((run, r) => [
    IS_PAIR ? html("h3", { css: { color: COLORS[r] } }, NAMES[r]) : null,
    html("div", { class: "cards" }, run.cards.map((card) =>
      html("div", { class: "card" }, html("small", {}, card.name), html("b", {}, card.value), html("small", {}, card.note)))),
  ]);
}

function numbersSection() {
  if (!IS_PAIR) {
    const rows = RUNS[0].summary.map((row) => [row.key, row.first, row.last, row.best, row.best_step]);
    return section("numbers", "Numbers", table("numbers", ["metric", "first", "last", "best", "at step"], rows));
  }
  const byKey = RUNS.map((run) => new Map(run.summary.map((row) => [row.key, row])));
  const keys = [...new Set(RUNS.flatMap((run) => run.summary.map((row) => row.key)))];
  const rows = keys.map((key) => [key, ...["last", "best"].flatMap((what) => byKey.map((run) => (run.has(key) ? run.get(key)[what] : "")))]);
  return section("numbers", "Numbers", table("numbers", ["metric", "A last", "B last", "A best", "B best"], rows));
}

function memorySection() {
  const known = RUNS.map((run, r) => [run.memory, r]).filter(([memory]) => memory);
  if (!known.length) return null;
  return section("memory", "Memory", known.map(([memory, r]) => [
    html("p", {}, IS_PAIR ? `${NAMES[r]}: ` : "", `GiB of ${memory.what}: the plan's estimate, and the most that was measured.`),
    table("numbers", ["phase", "estimated", "measured", "ratio"], memory.rows)]));
}

function configSection() {
  const different = IS_PAIR
    ? [html("h3", {}, "Where they differ"), DATA.differences.length ? table("texts", ["setting", ...NAMES], DATA.differences) : html("p", {}, "Nowhere.")]
    : [];
  return section("configuration", "Configuration", different, RUNS.map((run, r) => [
    IS_PAIR ? html("h3", {}, NAMES[r]) : null,
    run.config === null
      ? html("p", {}, `The run has no ${DATA.files.config}.`)
      : [table("texts", ["setting", "value"], run.config.rows),
        html("details", {}, html("summary", {}, "The whole configuration"), html("pre", {}, run.config.text))]]));
}
