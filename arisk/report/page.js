"use strict";
const figures = JSON.parse(document.getElementById("figures").textContent);
const root = document.documentElement;
const phone = matchMedia("(max-width: 600px)");

// Colours of the page as plain rgb: figures name them, the theme decides.
const probe = document.createElement("span");
probe.hidden = true;
document.body.append(probe);
function colour(name) {
  probe.style.color = `var(--${name})`;
  return getComputedStyle(probe).color;
}
const TOKENS = ["ink", "soft", "card"];
const SCALES = { cool: ["seq0", "cool1", "cool2"], warm: ["seq0", "warm1", "warm2"], diverging: ["down", "seq0", "up"] };
function resolved(value, key) {
  if (typeof value === "string") {
    if (key === "colorscale" && SCALES[value]) { return SCALES[value].map((name, i) => [i / 2, colour(name)]); }
    return TOKENS.includes(value) ? colour(value) : value;
  }
  if (Array.isArray(value)) { return key === "color" ? value.map((item) => resolved(item, key)) : value; }
  if (value && typeof value === "object") {
    return Object.fromEntries(Object.entries(value).map(([k, v]) => [k, ["x", "y", "z", "customdata"].includes(k) ? v : resolved(v, k)]));
  }
  return value;
}

function layoutOf(figure, narrow) {
  const size = narrow ? 11 : 13;
  const axis = { gridcolor: colour("grid"), zerolinecolor: colour("line"), linecolor: colour("line"),
    tickfont: { size, color: colour("soft") } };
  const layout = resolved(structuredClone(figure.layout), "");
  for (const key of ["xaxis", "yaxis", "yaxis2"]) {
    if (!layout[key] && key === "yaxis2") { continue; }
    layout[key] = { ...axis, ...layout[key] };
    layout[key].title = { standoff: 10, ...layout[key].title, font: { size, color: colour("soft") } };
  }
  const entries = figure.data.filter((trace) => trace.name && trace.showlegend !== false).length;
  if (narrow && layout.legend && entries > 4) { Object.assign(layout.legend, { entrywidth: 0.48, entrywidthmode: "fraction" }); }
  layout.annotations = layout.annotations || [];
  if (narrow && layout.yaxis.type === "category" && layout.yaxis.title.text) {
    layout.annotations.push({ text: layout.yaxis.title.text, xref: "paper", yref: "paper", x: 0, y: 1, xanchor: "left", yanchor: "bottom", showarrow: false });
    layout.yaxis.title.text = "";
  }
  for (const note of layout.annotations) {
    note.bgcolor = colour("card");
    note.borderpad = 1;
    note.font = { size: narrow ? 11 : 12, color: colour("ink") };
  }
  return {
    ...layout,
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: "system-ui, sans-serif", size, color: colour("ink") },
    hoverlabel: { bgcolor: colour("card"), bordercolor: colour("line"), font: { color: colour("ink"), size: 13 } },
    margin: { l: narrow ? 46 : 60, r: narrow ? 14 : 20, t: 18, b: narrow ? 44 : 50 },
    modebar: { bgcolor: "rgba(0,0,0,0)", color: colour("soft"), activecolor: colour("ink") },
    dragmode: narrow ? false : "zoom",
  };
}

function dataOf(figure, narrow) {
  const data = resolved(structuredClone(figure.data), "");
  return (Array.isArray(data) ? data : Object.values(data)).map((trace) => {
    const drawn = resolved(trace, "");
    if (narrow && drawn.textfont) { drawn.textfont.size = 11; }
    if (drawn.colorbar) { drawn.colorbar.tickfont = { size: narrow ? 11 : 12, color: colour("soft") }; }
    if (drawn.type === "bar") { drawn.textfont = { color: colour("ink") }; }
    return drawn;
  });
}

function draw(narrow = phone.matches) {
  for (const figure of figures) {
    const config = { displaylogo: false, responsive: true, modeBarButtonsToRemove: ["lasso2d", "select2d"],
      displayModeBar: narrow ? false : "hover" };
    Plotly.react(figure.id, dataOf(figure, narrow), layoutOf(figure, narrow), config);
  }
}

function setTheme(name) {
  root.dataset.theme = name;
  const other = name === "dark" ? "light" : "dark";
  const button = document.getElementById("theme");
  button.textContent = other[0].toUpperCase() + other.slice(1);
  button.setAttribute("aria-label", `switch to ${other} colours`);
  draw();
}
setTheme(root.dataset.theme);
document.getElementById("theme").addEventListener("click", () => setTheme(root.dataset.theme === "dark" ? "light" : "dark"));
phone.addEventListener("change", () => draw());

// Paper: light, every fold open, figures as wide as a page.
let before = null;
addEventListener("beforeprint", () => {
  before = { theme: root.dataset.theme, closed: [...document.querySelectorAll("details:not([open])")] };
  for (const box of before.closed) { box.open = true; }
  setTheme("light");
  for (const figure of figures) { Plotly.relayout(figure.id, { width: 660, autosize: false }); }
});
addEventListener("afterprint", () => {
  if (!before) { return; }
  for (const box of before.closed) { box.open = false; }
  for (const figure of figures) { Plotly.relayout(figure.id, { width: null, autosize: true }); }
  setTheme(before.theme);
  before = null;
});

for (const button of document.querySelectorAll("th button")) {
  button.addEventListener("click", () => {
    const header = button.parentElement;
    const body = header.closest("table").tBodies[0];
    const column = [...header.parentElement.children].indexOf(header);
    const down = header.getAttribute("aria-sort") !== "descending";
    for (const other of header.parentElement.children) { other.removeAttribute("aria-sort"); }
    header.setAttribute("aria-sort", down ? "descending" : "ascending");
    // What was not measured stays last, whichever way the rest is sorted.
    const key = (row) => { const v = row.children[column].dataset.value; return v === "" || v === undefined ? null : Number(v); };
    const rows = [...body.rows].map((row) => [key(row), row]);
    rows.sort(([a], [b]) => (a === null ? (b === null ? 0 : 1) : b === null ? -1 : down ? b - a : a - b));
    body.append(...rows.map(([, row]) => row));
  });
}

// The contents show where the reader is.
const links = new Map([...document.querySelectorAll(".contents a")].map((a) => [a.hash.slice(1), a]));
const spy = new IntersectionObserver((seen) => {
  for (const entry of seen) {
    if (!entry.isIntersecting) { continue; }
    for (const link of links.values()) { link.removeAttribute("aria-current"); }
    links.get(entry.target.id)?.setAttribute("aria-current", "true");
  }
}, { rootMargin: "-20% 0px -70% 0px" });
for (const id of links.keys()) { const part = document.getElementById(id); if (part && id !== "content") { spy.observe(part); } }
root.dataset.ready = "true";
