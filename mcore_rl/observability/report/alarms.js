// Alarms: a table, and below it what each of them means.

function alarmsSection() {
  const rows = DATA.alarms.map((alarm, i) => [
    html("a", { href: `#${alarm.anchor}` }, alarm.title),
    alarm.threshold,
    html("code", {}, alarm.key),
    ...RUNS.map((run) => verdict(run.alarms[i])),
  ]);
  const header = ["alarm", "fires when", "metric", ...(IS_PAIR ? NAMES : ["fired at steps"])];
  return section("alarms", "Alarms",
    table("words", header, rows),
    html("h3", {}, "What they mean"),
    DATA.alarms.map((alarm) => html("details", { id: alarm.anchor }, html("summary", {}, alarm.title), markdown(alarm.text))),
    html("p", {}, "The documentation has the same page: docs/alarms.md."));
}

/** Return the line at the top of the page that says which alarms fired. */
function alarmBanner() {
  return RUNS.map((run, r) => {
    const fired = DATA.alarms.filter((_, i) => run.alarms[i].num_steps);
    const name = IS_PAIR ? `${NAMES[r]}: ` : "";
    if (!fired.length) return html("p", { class: "banner quiet" }, `${name}No alarm fired.`);
    const links = fired.map((alarm) => html("a", { href: `#${alarm.anchor}` }, alarm.title));
    return html("p", { class: "banner loud" }, `${name}${fired.length} of ${DATA.alarms.length} alarms fired: `,
      links.flatMap((link, i) => (i ? [", ", link] : [link])), ". ", html("a", { href: "#alarms" }, "Where"));
  });
}

function verdict(fired) {
  if (fired.ranges === null) return html("span", { class: "faint" }, "not logged");
  if (!fired.num_steps) return html("span", { class: "ok" }, "quiet");
  const most = 6;
  const ranges = fired.ranges.slice(0, most).map(([first, last]) => (first === last ? `${first}` : `${first}–${last}`));
  const more = fired.ranges.length > most ? ` and ${fired.ranges.length - most} more` : "";
  return html("span", { class: "bad" }, `${ranges.join(", ")}${more} (${fired.value} at step ${fired.ranges[0][0]})`);
}

/** Return paragraphs and lists with `code` in them: all that docs/alarms.md uses. */
function markdown(text) {
  const inline = (line) => line.split("`").map((part, i) => (i % 2 ? html("code", {}, part) : part));
  return text.split("\n\n").map((block) => {
    if (!block.startsWith("- ")) return html("p", { class: "prose" }, inline(block));
    return html("ul", {}, block.slice(2).split("\n- ").map((item) => html("li", {}, inline(item))));
  });
}
