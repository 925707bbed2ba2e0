"""The report in a real browser: it draws, it is quiet, and it fits a phone."""

import html as escaping
import importlib.util
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

spec = importlib.util.spec_from_file_location("report_records", Path(__file__).parent / "records.py")
made = importlib.util.module_from_spec(spec)
spec.loader.exec_module(made)

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(
    BROWSER is None and not os.environ.get("CI"), reason="no Chromium on this machine (CI installs one)"
)
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--virtual-time-budget=20000",
    "--enable-logging=stderr",
    "--log-level=0",
]
# Runs after the page's own script and leaves what it saw in the document.
SPY = """<script>
const marks = {ready: document.documentElement.dataset.ready, title: document.title,
  overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth,
  width: document.documentElement.clientWidth, theme: document.documentElement.dataset.theme,
  requests: performance.getEntriesByType("resource").filter((e) => !e.name.startsWith("data:")).length};
const button = document.querySelectorAll("#examples th button")[3];
if (button) {
  button.click();
  const rows = [...document.querySelectorAll("#examples tbody tr")];
  marks.sorted = rows.map((row) => row.children[3].dataset.value).join(",");
}
document.getElementById("theme").click();
marks.flipped = document.documentElement.dataset.theme;
marks.figures = document.querySelectorAll(".plot .main-svg:first-child").length;
parent.postMessage(JSON.stringify(marks), "*");
</script></body>"""
# Headless windows are at least 500 pixels wide; a frame is as narrow as a phone.
FRAME = """<body style="margin:0">
<iframe src="page.html?theme={theme}" style="width:{width}px;height:900px;border:0"></iframe>
<script>addEventListener("message", (event) => {{
  const spy = document.createElement("pre");
  spy.textContent = "SPY:" + event.data;
  document.body.append(spy);
}});</script></body>"""


def opened(tmp_path, html, width=1440, theme="light"):
    """What the browser made of the page: marks of the spy, and console messages."""
    (tmp_path / "page.html").write_text(html.replace("</body>", SPY), encoding="utf-8")
    frame = tmp_path / "frame.html"
    frame.write_text(FRAME.format(theme=theme, width=width), encoding="utf-8")
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    command = [BROWSER, *FLAGS, profile, f"--window-size={max(width, 500)},900", "--dump-dom", frame.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    (spied,) = re.findall(r"<pre>SPY:(.*?)</pre>", done.stdout)
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return json.loads(escaping.unescape(spied)), console


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"text": made.HOSTILE, "title": made.HOSTILE},
        {"holes": True},
        {"layers": 80, "examples": 2000},
        {"layers": 1},
        {"check": made.checked(text=made.HOSTILE)},
        {"check": made.checked(missing="verify.generate is 0", values=[0.0], steps=(0,), diverged_at=1)},
    ],
    ids=["ordinary", "hostile", "holes", "large", "one layer", "verified", "diverged"],
)
def test_the_page_draws_quietly(tmp_path, settings):
    marks, console = opened(tmp_path, made.page(**settings))
    assert console == []
    assert marks["ready"] == "true"
    assert marks["requests"] == 0
    assert marks["title"] != "owned"
    assert marks["overflow"] <= 0
    assert {marks["theme"], marks["flipped"]} == {"light", "dark"}
    expected = (5 if settings.get("holes") else 8) + ("check" in settings)
    assert marks["figures"] == expected


def test_sorting_orders_the_rows(tmp_path):
    marks, _ = opened(tmp_path, made.page(examples=12))
    values = [float(v) for v in marks["sorted"].split(",")]
    assert values == sorted(values, reverse=True)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_a_phone_needs_no_sideways_scrolling(tmp_path, theme):
    page = made.page(text="w" * 300, check=made.checked(text="w" * 300))
    marks, console = opened(tmp_path, page.replace("<details>", "<details open>"), width=360, theme=theme)
    assert marks["width"] == 360
    assert marks["overflow"] <= 0
    assert marks["theme"] == theme
    assert console == []
