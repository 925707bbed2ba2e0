"use strict";
const figures = JSON.parse(document.getElementById("figures").textContent);
const root = document.documentElement;
const plain = { displaylogo: false, responsive: true, modeBarButtonsToRemove: ["lasso2d", "select2d"] };

function layoutOf(figure) {
  const style = getComputedStyle(root);
  const colour = (name) => style.getPropertyValue(name).trim();
  const narrow = window.innerWidth < 600;
  const axis = { gridcolor: colour("--line"), zerolinecolor: colour("--line"), linecolor: colour("--line") };
  const layout = structuredClone(figure.layout);
  for (const key of ["xaxis", "yaxis", "yaxis2"]) {
    if (layout[key] || key !== "yaxis2") { layout[key] = { ...axis, ...layout[key] }; }
  }
  const entries = figure.data.filter((trace) => trace.name).length;
  if (narrow && layout.legend && entries > 4) { Object.assign(layout.legend, { entrywidth: 0.48, entrywidthmode: "fraction" }); }
  for (const note of layout.annotations || []) {
    note.bgcolor = colour("--card");
    note.borderpad = 1;
    if (narrow) { note.font = { size: 9 }; }
  }
  return {
    ...layout,
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: "system-ui, sans-serif", size: narrow ? 11 : 13, color: colour("--ink") },
    hoverlabel: { bgcolor: colour("--card"), bordercolor: colour("--line"), font: { color: colour("--ink") } },
    margin: { l: narrow ? 46 : 64, r: narrow ? 18 : 24, t: narrow ? 16 : 36, b: narrow ? 44 : 56 },
    modebar: { bgcolor: "rgba(0,0,0,0)", color: colour("--soft"), activecolor: colour("--ink") },
    dragmode: narrow ? false : "zoom",
  };
}

// "ink" stands for the colour of the page's text, which the theme decides.
function dataOf(figure) {
  const ink = getComputedStyle(root).getPropertyValue("--ink").trim();
  const data = structuredClone(figure.data);
  const narrow = window.innerWidth < 600;
  for (const trace of data) {
    for (const part of [trace.line, trace.marker]) { if (part && part.color === "ink") { part.color = ink; } }
    if (narrow && trace.textfont) { trace.textfont.size = 9; }
  }
  return data;
}

function draw() {
  for (const figure of figures) {
    Plotly.react(figure.id, dataOf(figure), layoutOf(figure), { ...plain, displayModeBar: window.innerWidth >= 600 && "hover" });
  }
}

function setTheme(name) {
  root.dataset.theme = name;
  const button = document.getElementById("theme");
  button.textContent = name === "dark" ? "Light" : "Dark";
  button.setAttribute("aria-label", "switch to " + (name === "dark" ? "light" : "dark") + " colours");
  draw();
}

const preferred = new URLSearchParams(location.search).get("theme")
  || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
setTheme(preferred);
document.getElementById("theme").addEventListener("click", () => setTheme(root.dataset.theme === "dark" ? "light" : "dark"));

for (const button of document.querySelectorAll("th button")) {
  button.addEventListener("click", () => {
    const header = button.parentElement;
    const body = header.closest("table").tBodies[0];
    const column = [...header.parentElement.children].indexOf(header);
    const down = header.getAttribute("aria-sort") !== "descending";
    for (const other of header.parentElement.children) { other.removeAttribute("aria-sort"); }
    header.setAttribute("aria-sort", down ? "descending" : "ascending");
    const key = (row) => { const v = row.children[column].dataset.value; return v === "" || v === undefined ? -Infinity : Number(v); };
    const rows = [...body.rows].sort((a, b) => (down ? key(b) - key(a) : key(a) - key(b)));
    body.append(...rows);
  });
}
root.dataset.ready = "true";
