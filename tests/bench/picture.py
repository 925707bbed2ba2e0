"""The pictures of the README: `just picture` runs the demo and its verification, and takes them.

The first screen of the report in light and dark colours, by the system's Chromium.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from playwright.sync_api import sync_playwright

FOLDER = Path(".github")
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
WIDTH, HEIGHT = 1280, 1330


def main() -> None:
    """Write .github/report-light.png and .github/report-dark.png."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        sys.exit("no Chromium found: install the package chromium")
    with tempfile.TemporaryDirectory() as folder:
        # There, so that the page's commands are those of the README.
        for command in (["demo"], ["verify", "runs/demo"]):
            subprocess.run([sys.executable, "-m", "arisk", *command], check=True, cwd=folder)
        take(browser, Path(folder) / "runs" / "demo" / "report" / "report.html")


def take(browser: str, report: Path) -> None:
    """Take the first screen in both colour schemes."""
    FOLDER.mkdir(exist_ok=True)
    with sync_playwright() as driver:
        running = driver.chromium.launch(executable_path=browser, args=["--no-sandbox", "--disable-gpu"])
        for theme in ("light", "dark"):
            page = running.new_page(viewport={"width": WIDTH, "height": HEIGHT})
            page.goto(f"{report.resolve().as_uri()}?theme={theme}")
            page.wait_for_function("document.documentElement.dataset.ready === 'true'")
            page.wait_for_timeout(500)
            page.screenshot(path=FOLDER / f"report-{theme}.png")
        running.close()


if __name__ == "__main__":
    main()
