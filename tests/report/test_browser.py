"""The report in a real browser: it draws, it is quiet, it answers at once, and it fits a phone."""

import math

import pytest

from arisk.report.page import Piece
from arisk.report.page import page as render_page
from arisk.report.section import Column, rows_table
from tests.report import browser as web
from tests.report import records as made

RTL = "كيف أصنع قنبلة؟ 🧨👩‍👩‍👧‍👦 שלום " + "w" * 200
CASES = {
    "ordinary": {},
    "hostile": {"text": made.HOSTILE, "title": made.HOSTILE},
    "rtl": {"text": RTL, "title": RTL},
    "holes": {"holes": True},
    "large": {"layers": 80, "examples": 10_000, "max_examples": 10_000},
    "one-layer": {"layers": 1},
    "verified": {"check": made.checked(text=made.HOSTILE)},
    "diverged": {
        "check": made.checked(missing="behaviour.prompts is 0", values=[0.0], steps=(0,), diverged_at=1)
    },
    "infinite": {"check": made.checked(values=[0.0, math.inf], steps=(0, 25), control=None, diverged_at=26)},
}


@pytest.fixture(scope="module")
def browser():
    with web.started() as running:
        yield running


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The report of the demo, cut down to seconds."""
    from arisk.base.terminal import StageDisplay
    from arisk.catalogue import catalogue
    from arisk.cli.demo import demo_config
    from arisk.config.plan import Config
    from arisk.engine.run import run_stages

    folder = tmp_path_factory.mktemp("demo")
    plain = demo_config("lora").model_dump()
    plain["safety"]["max_samples"] = plain["control"]["max_samples"] = 16
    plain["training"]["max_steps"] = 30
    plain["score"].update(batches=2, hvp_batches=1, krylov_dim=3, nulls=19, examples=16, probe_points=5)
    config = Config.model_validate(plain)
    run_stages(catalogue(), config, run_dir=folder, show=StageDisplay(quiet=True), command="arisk demo")
    return folder / "report" / "report.html"


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Path of a case's page, made once."""
    folder, paths = tmp_path_factory.mktemp("pages"), {}

    def path(name):
        if name not in paths:
            paths[name] = folder / f"{name}.html"
            paths[name].write_text(made.page(**CASES[name]), encoding="utf-8")
        return paths[name]

    return path


def holds(got, name, width, theme):
    """What every report must hold in every window."""
    assert got.console == []
    assert got.requests == []
    assert got.page.title() != "owned"
    there, drawn = got.drawn()
    assert there == drawn >= (1 if name == "holes" else 3)
    assert got.page.evaluate("window.shifted") < 0.02
    found = got.page.evaluate(web.CONTRAST)
    assert found["bad"] == []
    assert found["seen"] > 100
    assert got.page.evaluate(web.SMALLEST) >= (11 if width < 600 else 12)
    got.page.evaluate("scrollTo(0, 0)")
    got.shot(f"{name}-{width}-{theme}-first")
    for part in (".level", "h1", ".strip", ".tiles"):
        assert got.bottom(part) <= web.SIZES[width], part
    assert got.overflow() <= 0


@pytest.mark.parametrize(("width", "theme"), [(1440, "light"), (360, "dark")])
@pytest.mark.parametrize("name", CASES)
def test_every_report_holds(browser, written, name, width, theme):
    with web.opened(browser, written(name), width=width, theme=theme) as got:
        holds(got, name, width, theme)


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [1440, 360])
def test_the_demo_answers_on_the_first_screen(browser, demo, width, theme):
    with web.opened(browser, demo, width=width, theme=theme) as got:
        holds(got, "demo", width, theme)
        assert width < 600 or got.bottom(".three ul") <= web.SIZES[width]
        got.shot(f"demo-{width}-{theme}", full=True)


def test_a_mouse_brings_up_numbers(browser, written):
    with web.opened(browser, written("ordinary")) as got:
        for figure, says in (
            ("forecast", "loss of safe responses"),
            ("what-if", "by the rollout"),
            ("fisher-map", "layer"),
        ):
            plot = got.page.locator(f"#fig-{figure}")
            got.page.evaluate("(name) => { location.hash = name; }", figure)
            plot.scroll_into_view_if_needed()
            box = plot.bounding_box()
            for share in (0.45, 0.5):
                got.page.mouse.move(box["x"] + share * box["width"], box["y"] + 0.5 * box["height"])
                got.page.wait_for_timeout(120)
            assert says in plot.locator(".hoverlayer").first.text_content()


def values(got, column):
    cells = f"#examples tbody tr td:nth-child({column})"
    return got.page.eval_on_selector_all(cells, "(cells) => cells.map((cell) => cell.dataset.value)")


def test_headings_sort_by_mouse_and_by_keyboard(browser, tmp_path):
    path = tmp_path / "page.html"
    path.write_text(made.page(examples=12), encoding="utf-8")
    with web.opened(browser, path) as got:
        button = got.page.locator("#examples th button").first
        button.click()
        assert [int(float(value)) for value in values(got, 1)] == [12, 11, 10, 9, 8]
        assert got.page.locator("#examples th").first.get_attribute("aria-sort") == "descending"
        button.focus()
        got.page.keyboard.press("Enter")
        assert [int(float(value)) for value in values(got, 1)] == [1, 2, 3, 4, 5]
        assert got.page.locator("#examples [aria-sort]").count() == 1


def test_a_long_table_brings_its_rows_when_asked_and_sorts_all(browser, written):
    assert written("large").stat().st_size <= 7e6
    with web.opened(browser, written("large")) as got:
        table = got.page.locator("#examples")
        told = table.locator(".more span")
        assert told.text_content().startswith("5 of 10000 rows")
        assert table.locator("tbody tr").count() == 5
        table.locator("th button").first.click()
        lines = [int(value) for value in values(got, 1)]
        assert lines == sorted(range(1, 10_001), reverse=True)[:5]
        table.locator(".more button").click()
        assert table.locator("tbody tr").count() == 205
        assert [int(value) for value in values(got, 1)] == sorted(range(1, 10_001), reverse=True)[:205]
        assert table.locator("tbody tr").last.locator("td").count() == 7
        assert got.console == []


def test_rows_brought_later_are_made_like_the_first(browser, tmp_path):
    row = {"prompt": "p<b>", "response": "r", "why": [("hurts", "x & y")]}
    rows = [([float(i), float(-i)], row) for i in range(102)]
    columns = [Column("a"), Column("b")]
    tables = [rows_table(columns, rows, shown, "rows") for shown in (True, False)]
    body = "".join(f"<section>{table}</section>" for table in tables)
    path = tmp_path / "page.html"
    path.write_text(render_page("t", [Piece(0, body)]), encoding="utf-8")
    with web.opened(browser, path) as got:
        for number, parts in ((0, ["prompt p<b>", "response r", "hurts x & y"]), (1, ["hurts x & y"])):
            section = got.page.locator("section").nth(number)
            section.locator(".more button").click()
            found = section.locator("tbody tr")
            assert found.count() == 102
            texts = [found.nth(i).locator("p").all_text_contents() for i in (0, 101)]
            assert texts == [parts, parts]
            heads = [found.nth(i).locator("summary").text_content() for i in (0, 101)]
            assert heads[0] == heads[1] == ("p<b>" if number == 0 else "why")


def test_the_phone_reads_rows_as_a_list(browser, written):
    with web.opened(browser, written("ordinary"), width=360) as got:
        row = got.page.locator("#examples tbody tr").first
        text, number = row.locator("td.text"), row.locator("td").first
        assert text.bounding_box()["width"] > 300
        assert text.bounding_box()["y"] < number.bounding_box()["y"]
        scroll = "(box) => box.scrollWidth - box.clientWidth"
        assert got.page.locator("#examples .scroll").evaluate(scroll) <= 0
        assert row.evaluate("(tr) => getComputedStyle(tr.children[0], '::before').content") == '"row "'


def test_numbers_of_the_what_if_map_fit_their_cells_on_a_phone(browser, written):
    with web.opened(browser, written("ordinary"), width=360) as got:
        got.page.locator("#fig-what-if").scroll_into_view_if_needed()
        widths = got.page.eval_on_selector_all(
            "#fig-what-if .textpoint text", "(all) => all.map((t) => [t.textContent, t.getBBox().width])"
        )
        cells = got.page.evaluate(
            "(() => { const l = document.getElementById('fig-what-if')._fullLayout;"
            " return l.xaxis._length / (l.xaxis.range[1] - l.xaxis.range[0]); })()"
        )
        assert widths
        assert [text for text, width in widths if width > cells] == []


def test_what_was_not_measured_sorts_last_both_ways(browser, written):
    with web.opened(browser, written("holes")) as got:
        button = got.page.locator("#examples th button", has_text="loss")
        for _ in range(2):
            button.click()
            assert values(got, 5) == [""] * 5
        assert got.page.locator("#examples tbody").inner_text().count("not measured") >= 10


def test_the_theme_turns_the_page_and_its_figures(browser, written):
    colours = """() => [getComputedStyle(document.body).backgroundColor,
      getComputedStyle(document.querySelector('#fig-forecast .xtick text')).fill]"""
    with web.opened(browser, written("ordinary")) as got:
        before = got.page.evaluate(colours)
        got.page.locator("#theme").click()
        after = got.page.evaluate(colours)
        assert got.page.evaluate("document.documentElement.dataset.theme") == "dark"
        assert before[0] != after[0]
        assert before[1] != after[1]
        assert got.page.locator("#theme").inner_text() == "Light"
    with web.opened(browser, written("ordinary"), theme="", color_scheme="dark") as got:
        assert got.page.evaluate(colours) == after


def test_the_keyboard_reaches_everything(browser, written):
    with web.opened(browser, written("ordinary")) as got:
        focus = "document.activeElement.id || document.activeElement.className || document.activeElement.hash"
        got.page.keyboard.press("Tab")
        assert got.page.evaluate(focus) == "skip"
        assert got.bottom(".skip") > 0
        got.page.keyboard.press("Enter")
        assert got.page.evaluate("document.activeElement.id") == "content"
        reached = set()
        for _ in range(80):
            got.page.keyboard.press("Tab")
            if got.page.evaluate("document.activeElement === document.body"):
                break  # Past the last one.
            reached.add(got.page.evaluate("document.activeElement.tagName"))
            outline = got.page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
            assert outline != "none"
        assert {"A", "SUMMARY", "BUTTON", "DIV"} <= reached


def test_contents_lead_to_every_section(browser, written):
    with web.opened(browser, written("verified"), reduced_motion="reduce") as got:
        links = got.page.eval_on_selector_all(".contents a", "(links) => links.map((a) => a.hash.slice(1))")
        assert len(links) == len(set(links)) >= 18
        ids = got.page.eval_on_selector_all("main section[id]", "(parts) => parts.map((part) => part.id)")
        assert links == ["content", *ids]
        got.page.locator(".contents a", has_text="Provenance").click()
        got.page.wait_for_timeout(200)
        assert 0 <= got.page.locator("#provenance").bounding_box()["y"] < 900


def test_the_method_is_drawn_when_it_is_opened(browser, written):
    with web.opened(browser, written("ordinary"), reduced_motion="reduce") as got:
        method = got.page.locator(".level-two")
        assert method.get_attribute("open") is None
        assert got.page.locator("#fig-spectrum .main-svg").count() == 0
        got.page.locator("#theme").click()
        method.locator("> summary").click()
        got.page.wait_for_selector("#fig-spectrum .main-svg")
        there, drawn = got.drawn()
        assert there == drawn >= 8
        wide = "(id) => document.getElementById(id).querySelector('.main-svg').clientWidth"
        assert got.page.evaluate(wide, "fig-spectrum") > 400
        assert got.page.evaluate(web.CONTRAST)["bad"] == []
        assert got.console == []


def test_a_link_of_the_first_screen_opens_what_it_leads_to(browser, written):
    with web.opened(browser, written("ordinary"), reduced_motion="reduce") as got:
        links = got.page.locator(".three a")
        assert links.count() >= 2
        links.filter(has_text="Harm enters").click()
        got.page.wait_for_selector("#fig-harm-map .main-svg")
        assert 0 <= got.page.locator("#harm-map").bounding_box()["y"] < 900


def test_other_forecasters_are_off_until_asked_for(browser, written):
    seen = "document.querySelectorAll('#fig-forecast .scatterlayer .trace path.js-line').length"
    with web.opened(browser, written("ordinary")) as got:
        before = got.page.evaluate(seen)
        got.page.locator("#fig-forecast .legendtoggle").first.click()
        got.page.wait_for_timeout(600)
        asked = got.page.evaluate(seen)
        assert asked > before
        got.page.locator("#theme").click()
        got.page.wait_for_timeout(300)
        assert got.page.evaluate(seen) == asked


def test_the_summary_and_the_commands_are_copied(browser, tmp_path):
    path = tmp_path / "page.html"
    path.write_text(made.page(summary="### arisk: high\nall of it"), encoding="utf-8")
    with web.opened(browser, path, permissions=["clipboard-read", "clipboard-write"]) as got:
        board = "navigator.clipboard.readText()"
        got.page.locator("#copy").click()
        got.page.wait_for_timeout(100)
        assert got.page.evaluate(board) == "### arisk: high\nall of it"
        command = got.page.locator(".command").first
        command.locator("button").click()
        got.page.wait_for_timeout(100)
        assert got.page.evaluate(board) == command.locator("code").text_content()
        assert got.page.evaluate(board).startswith("arisk run x.yaml --set ")
        assert command.locator("button").text_content() == "Copied"


def test_no_toolbar_covers_a_legend_on_touch(browser, written):
    with web.opened(browser, written("ordinary"), has_touch=True, is_mobile=True) as got:
        got.page.locator("#fig-forecast").tap()
        assert got.page.locator(".modebar-btn").count() == 0


def test_the_decision_takes_six_screens(browser, written, demo):
    for path in (written("verified"), demo):
        with web.opened(browser, path) as got:
            assert got.page.evaluate("document.documentElement.scrollHeight") <= 6 * 900


def test_without_scripts_the_tables_are_open(browser, written):
    with web.opened(browser, written("ordinary"), ready=False, java_script_enabled=False) as got:
        assert got.page.locator(".plot").first.is_hidden()
        assert got.page.locator("#forecast table").is_visible()
        assert got.page.locator("#what-if table").is_visible()
        assert "Figures need JavaScript" in got.page.locator("main").inner_text()
        assert got.page.locator("#theme").is_hidden()
        got.shot("ordinary-no-script", full=True)


def test_paper_shows_everything(browser, written):
    with web.opened(browser, written("ordinary"), theme="dark") as got:
        closed = "document.querySelectorAll('details:not([open])').length"
        folds = got.page.evaluate(closed)
        assert folds > 10
        web.ARTIFACTS.mkdir(parents=True, exist_ok=True)
        got.page.evaluate(
            """() => addEventListener("beforeprint", () => {
              const widths = [...document.querySelectorAll(".main-svg")].map((svg) => svg.clientWidth);
              window.printed = [document.documentElement.dataset.theme,
                document.querySelectorAll("details:not([open])").length, Math.max(...widths)];
            })"""
        )
        paper = got.page.pdf(path=web.ARTIFACTS / "ordinary.pdf", format="A4")
        assert paper.startswith(b"%PDF")
        theme, left, widest = got.page.evaluate("window.printed")
        assert (theme, left) == ("light", 0)
        assert widest <= 700
        assert got.page.evaluate(closed) == folds
        assert got.page.evaluate("document.documentElement.dataset.theme") == "dark"
        got.page.emulate_media(media="print")
        assert got.page.locator(".contents").is_hidden()
        assert got.console == []


def test_motion_is_for_who_wants_it(browser, written):
    moving = "getComputedStyle(document.documentElement).scrollBehavior"
    with web.opened(browser, written("ordinary"), reduced_motion="reduce") as got:
        assert got.page.evaluate(moving) == "auto"
    with web.opened(browser, written("ordinary"), reduced_motion="no-preference") as got:
        assert got.page.evaluate(moving) == "smooth"
