// Puts the sections on the page and follows the address.

function build() {
  readState();
  const sections = [
    html("section", { id: "overview" }, alarmBanner(), cards()),
    curvesSection(), timelineSection(), alarmsSection(), samplesSection(), numbersSection(), memorySection(), configSection(),
  ].filter(Boolean);
  document.getElementById("main").append(...sections);
  document.getElementById("nav").append(...sections.slice(1).map((of) =>
    html("a", { href: `#${of.id}` }, of.querySelector("h2").textContent)));
  window.addEventListener("hashchange", follow);
  follow();
}

/** Show what the address asks for: a state, or a place on the page. */
function follow() {
  if (readState()) {
    listeners.forEach((listener) => listener());
    const filters = ["step", "split", "search", "min", "max", "color"];
    if (filters.some((key) => state[key] !== undefined)) document.getElementById("samples").scrollIntoView();
    return;
  }
  const place = document.getElementById(decodeURIComponent(location.hash.slice(1)));
  if (!place) return;
  if (place.tagName === "DETAILS") place.open = true;
  place.scrollIntoView();
}

build();
