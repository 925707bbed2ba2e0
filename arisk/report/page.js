"use strict";
const figures = JSON.parse(document.getElementById("figures").textContent);
const root = document.documentElement;
const phone = matchMedia("(max-width: 600px)");
const touch = matchMedia("(hover: none)");

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
// The series colours are chosen for white; on dark ground the same hues need more light.
const DARK = { "#0072B2": "#56b4e9", "#D55E00": "#ff8a4c", "#009E73": "#35c79b", "#CC79A7": "#e79cc6", "#B8860B": "#dcae3a" };
function resolved(value, key) {
  if (typeof value === "string") {
    if (root.dataset.theme === "dark" && DARK[value]) { return DARK[value]; }
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
  for (const key of ["xaxis", "yaxis", "xaxis2", "yaxis2"]) {
    if (!layout[key] && key.endsWith("2")) { continue; }
    layout[key] = { ...axis, ...layout[key] };
    layout[key].title = { standoff: 10, ...layout[key].title, font: { size, color: colour("soft") } };
  }
  const entries = figure.data.filter((trace) => trace.name && trace.showlegend !== false).length;
  if (narrow && layout.legend && entries > 4) { Object.assign(layout.legend, { entrywidth: 0.48, entrywidthmode: "fraction" }); }
  // Names of many columns run into one another on a phone.
  if (narrow && layout.xaxis.type === "category" && figure.data[0].x?.length > 12) { layout.xaxis.nticks = 6; }
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
    // Names beside points run into one another on a phone: hover and table have them.
    const long = drawn.mode === "markers+text" && [drawn.text].flat().some((text) => text.length > 3);
    if (narrow && long) { drawn.mode = "markers"; }
    if (narrow && drawn.textfont) {
      drawn.textfont.size = 11;
      // A phone's cell holds four characters; that a row is rough is said beside it too.
      drawn.text = drawn.text.map((text) => (text.length > 4 && text.startsWith("~") ? text.slice(1) : text));
    }
    if (drawn.colorbar) { drawn.colorbar.tickfont = { size: narrow ? 11 : 12, color: colour("soft") }; }
    if (drawn.type === "bar") { drawn.textfont = { color: colour("ink") }; }
    return drawn;
  });
}

// A figure is drawn when it is first seen: one that is folded away has no width yet.
const drawn = new Set();
function drawOne(figure, narrow) {
  const config = { displaylogo: false, responsive: true, modeBarButtonsToRemove: ["lasso2d", "select2d"],
    displayModeBar: narrow || touch.matches ? false : "hover" };
  Plotly.react(figure.id, dataOf(figure, narrow), { ...layoutOf(figure, narrow), uirevision: "kept" }, config);
  drawn.add(figure.id);
}
function draw(anew = true) {
  for (const figure of figures) {
    const there = !document.getElementById(figure.id).closest("details:not([open])");
    if (there && (anew || !drawn.has(figure.id))) { drawOne(figure, phone.matches); }
    if (!there && anew) { drawn.delete(figure.id); }
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
addEventListener("toggle", (event) => { if (event.target.open) { draw(false); } }, true);
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

// Texts that are copied: the summary, and commands.
async function copied(button, text) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    const box = Object.assign(document.createElement("textarea"), { value: text });
    document.body.append(box);
    box.select();
    document.execCommand("copy");
    box.remove();
  }
  const label = button.textContent;
  button.textContent = "Copied";
  setTimeout(() => { button.textContent = label; }, 1200);
}
const summary = JSON.parse(document.getElementById("summary").textContent);
const copier = document.getElementById("copy");
copier?.addEventListener("click", () => copied(copier, summary));
for (const button of document.querySelectorAll("button.copy")) {
  button.addEventListener("click", () => copied(button, button.previousElementSibling.textContent));
}
document.getElementById("print").addEventListener("click", () => print());

// A link leads into what is folded away, too.
function unfold() {
  const target = location.hash.length > 1 && document.getElementById(decodeURIComponent(location.hash.slice(1)));
  if (!target) { return; }
  let folded = false;
  for (let at = target.closest("details"); at; at = at.parentElement.closest("details")) {
    folded ||= !at.open;
    at.open = true;
  }
  if (folded) { draw(false); target.scrollIntoView(); }
}
addEventListener("hashchange", unfold);
for (const link of document.querySelectorAll("a[href^='#']")) {
  // Also where the place is in the address already.
  link.addEventListener("click", () => setTimeout(unfold));
}
unfold();

// Rows of a long table that are not HTML yet: shown texts of the cells, prompt, response, further texts.
const MORE = 200;
function element(name, props, ...children) {
  const made = Object.assign(document.createElement(name), props);
  made.append(...children);
  return made;
}
function textCell(prompt, response, why) {
  const cell = element("td", { className: "text" });
  cell.setAttribute("role", "cell");
  const parts = prompt || response
    ? [["prompt", prompt], ["response", response || "not in this page: see the data file"], ...why] : why;
  if (!parts.length) { cell.classList.add("note"); cell.append("not shown"); return cell; }
  const short = prompt.length > 72 ? prompt.slice(0, 71) + "…" : prompt || "(no prompt)";
  cell.dir = "auto";
  cell.append(element("details", {}, element("summary", {}, parts === why ? "why" : short),
    ...parts.map(([label, text]) => element("p", { dir: "auto" }, element("b", {}, label), " " + text))));
  return cell;
}
function rowOf(data, names) {
  const cells = data.slice(0, -3).map((shown, i) => {
    const cell = element("td", {}, shown);
    Object.assign(cell.dataset, { label: names[i], value: Number.isFinite(Number(shown)) ? shown : "" });
    cell.setAttribute("role", "cell");
    return cell;
  });
  cells.splice(2, 0, textCell(...data.slice(-3)));
  const row = element("tr", {}, ...cells);
  row.setAttribute("role", "row");
  return row;
}

for (const table of document.querySelectorAll("table.rows")) {
  const body = table.tBodies[0];
  const headers = [...table.tHead.rows[0].cells];
  const names = headers.filter((header) => header.querySelector("button")).map((header) => header.textContent);
  const source = table.parentElement.nextElementSibling;
  const others = source?.matches("script.others") ? JSON.parse(source.textContent) : [];
  // A row is its element, or what it will be made of.
  let rows = [...body.rows, ...others];
  let shown = body.rows.length;
  const at = (row, column) => {
    const v = row instanceof Element ? row.cells[column].dataset.value : row[column > 2 ? column - 1 : column];
    return v === "" || v === undefined || !Number.isFinite(Number(v)) ? null : Number(v);
  };
  const show = () => {
    rows = rows.map((row, i) => (i < shown && !(row instanceof Element) ? rowOf(row, names) : row));
    body.replaceChildren(...rows.slice(0, shown));
    if (!others.length) { return; }
    const more = source.nextElementSibling;
    more.querySelector("span").textContent = `${shown} of ${rows.length} rows are shown; a heading sorts all of them.`;
    more.querySelector("button").hidden = shown >= rows.length;
  };
  if (others.length) {
    source.nextElementSibling.querySelector("button").addEventListener("click", () => {
      shown = Math.min(shown + MORE, rows.length);
      show();
    });
  }
  headers.forEach((header, column) => header.querySelector("button")?.addEventListener("click", () => {
    const down = header.getAttribute("aria-sort") !== "descending";
    for (const other of headers) { other.removeAttribute("aria-sort"); }
    header.setAttribute("aria-sort", down ? "descending" : "ascending");
    // What was not measured stays last, whichever way the rest is sorted.
    const keyed = rows.map((row) => [at(row, column), row]);
    keyed.sort(([a], [b]) => (a === null ? (b === null ? 0 : 1) : b === null ? -1 : down ? b - a : a - b));
    rows = keyed.map(([, row]) => row);
    show();
  }));
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
