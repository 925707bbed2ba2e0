"""A page opened in a real browser, and what can be asked of it there."""

import contextlib
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

BROWSER = next(
    filter(
        None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable"))
    ),
    None,
)
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
ROOT = Path(__file__).parents[2]
ARTIFACTS = ROOT / "artifacts" / "report"
SIZES = {1440: 900, 360: 740}

#: Sums every shift of the layout from before the first byte on.
SHIFTS = """window.shifted = 0;
new PerformanceObserver((list) => { for (const e of list.getEntries()) { window.shifted += e.value; } })
  .observe({ type: "layout-shift", buffered: true });"""

#: Text that is read worse than WCAG AA asks for: 4.5, or 3 for large text, against what lies behind it.
CONTRAST = """() => {
  const rgb = (text) => {
    const [r, g, b, a = 1] = text.match(/[\\d.]+/g).map(Number);
    return { r, g, b, a };
  };
  const skipped = "script, style, noscript, .skip, .textpoint, .modebar";
  const light = (c) => [c.r, c.g, c.b].map((v) => v / 255)
    .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const over = (c, back) => ({ r: c.r * c.a + back.r * (1 - c.a), g: c.g * c.a + back.g * (1 - c.a),
    b: c.b * c.a + back.b * (1 - c.a), a: 1 });
  const behind = (node) => {
    for (let at = node; at; at = at.parentElement) {
      const colour = rgb(getComputedStyle(at).backgroundColor);
      if (colour.a > 0.99) { return colour; }
    }
    return { r: 255, g: 255, b: 255, a: 1 };
  };
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  const bad = [];
  let seen = 0;
  for (let node = walker.nextNode(); node; node = walker.nextNode()) {
    const holder = node.parentElement;
    if (!node.data.trim() || holder.closest(skipped)) { continue; }
    const range = document.createRange();
    range.selectNodeContents(node);
    const box = range.getBoundingClientRect();
    const style = getComputedStyle(holder);
    if (!box.width || !box.height || style.visibility === "hidden") { continue; }
    const drawn = holder.closest("svg");
    let ink = rgb(drawn ? style.fill : style.color);
    ink.a *= Number(style.opacity) * (drawn ? Number(style.fillOpacity) : 1);
    const back = behind(drawn ? holder.closest(".plot").parentElement : holder);
    const [low, high] = [light(over(ink, back)), light(back)].sort((a, b) => a - b);
    const ratio = (high + 0.05) / (low + 0.05);
    const size = parseFloat(style.fontSize), bold = Number(style.fontWeight) >= 700;
    const least = size >= 24 || (bold && size >= 18.66) ? 3 : 4.5;
    seen += 1;
    if (ratio < least) { bad.push(`${ratio.toFixed(2)} ${style.fontSize} ${node.data.trim().slice(0, 40)}`); }
  }
  return { seen, bad };
}"""

#: The smallest text that is seen, in px.
SMALLEST = """() => {
  let least = Infinity;
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node = walker.nextNode(); node; node = walker.nextNode()) {
    const holder = node.parentElement;
    if (!node.data.trim() || holder.closest("script, style, noscript, .skip, sup, sub")) { continue; }
    // Exponents of plotly's tick labels are set as shifted tspans.
    if (holder.matches("tspan")) { continue; }
    const range = document.createRange();
    range.selectNodeContents(node);
    if (!range.getBoundingClientRect().width) { continue; }
    least = Math.min(least, parseFloat(getComputedStyle(holder).fontSize));
  }
  return least;
}"""


@dataclass
class Opened:
    """A page in the browser with everything it said and asked for."""

    page: Any
    console: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def overflow(self):
        """Pixels by which the page is wider than the window, every fold open."""
        self.page.evaluate("for (const box of document.querySelectorAll('details')) { box.open = true; }")
        wide = self.page.evaluate(
            "document.documentElement.scrollWidth - document.documentElement.clientWidth"
        )
        self.page.evaluate("for (const box of document.querySelectorAll('details')) { box.open = false; }")
        return wide

    def bottom(self, selector):
        """Where the first match ends, in px from the top of the window."""
        return self.page.eval_on_selector(selector, "(node) => node.getBoundingClientRect().bottom")

    def drawn(self):
        """Figures that are not folded away, and those of them that plotly has drawn."""
        return self.page.evaluate(
            "['.plot', '.plot .main-svg:first-child'].map((name) => [...document.querySelectorAll(name)]"
            ".filter((node) => !node.closest('details:not([open])')).length)"
        )

    def shot(self, name, *, full=False):
        """A screenshot among the artifacts of the tests."""
        ARTIFACTS.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=ARTIFACTS / f"{name}.png", full_page=full)


@contextlib.contextmanager
def started():
    """Chromium under playwright; without a browser the tests are skipped, in CI they fail."""
    if BROWSER is None:
        why = "no Chromium on this machine"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(why)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=BROWSER, args=FLAGS)
        yield browser
        browser.close()


@contextlib.contextmanager
def opened(browser, path, *, width=1440, theme="light", ready=True, **context):
    """The file in a window of this width, settled."""
    made = browser.new_context(viewport={"width": width, "height": SIZES[width]}, **context)
    page = made.new_page()
    got = Opened(page)
    page.on("console", lambda message: got.console.append(message.text))
    page.on("pageerror", lambda error: got.console.append(str(error)))
    page.on("request", lambda request: got.requests.append(request.url))
    page.add_init_script(SHIFTS)
    page.goto(f"{path.as_uri()}?theme={theme}")
    if ready:
        page.wait_for_function("document.documentElement.dataset.ready === 'true'")
        page.wait_for_timeout(150)
    got.requests = [url for url in got.requests if not url.startswith(("data:", path.as_uri()))]
    yield got
    made.close()
