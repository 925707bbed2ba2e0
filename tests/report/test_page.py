"""The page: safe, self-contained, in order, and made of whatever sections are handed in."""

import json
import re

from arisk.report.figure import Figure, step_lines
from arisk.report.page import (
    Answer,
    Finding,
    Piece,
    Section,
    figures_of,
    findings_of,
    render,
    stage_costs,
    summary_json,
    summary_markdown,
)
from arisk.report.text import number, percent
from tests.report import records as made
from tests.report.reading import figure, parsed

FIGURES = ("forecast", "what-if", "drift", "move", "samples", "fisher-map", "harm-map", "spectrum")
FIGURES += ("overlap", "costs")


def test_equal_records_give_equal_bytes_within_the_size():
    assert made.page() == made.page()
    assert len(made.page(examples=10_000, max_examples=10_000).encode()) < 12e6
    assert len(made.page().encode()) < 7e6


def test_nothing_is_fetched():
    structure = parsed(made.page())
    sources = [
        (tag, key, value) for tag, key, value in structure.attributes if key in ("src", "href", "srcset")
    ]
    assert all(value.startswith(("#", "data:")) for _, _, value in sources)
    policies = [value for _, key, value in structure.attributes if key == "content"]
    assert any("default-src 'none'" in value for value in policies)


def test_hostile_text_stays_text():
    page = made.page(title=made.HOSTILE, text=made.HOSTILE)
    structure = parsed(page)
    assert structure.tags.count("script") == 4
    assert "img" not in structure.tags
    assert not any(key.startswith("on") for _, key, _ in structure.attributes)
    assert made.HOSTILE not in page
    (figures,) = re.findall(r'<script type="application/json" id="figures">(.*?)</script>', page)
    json.loads(figures)


def test_ids_are_unique_and_every_figure_reads():
    page = made.page()
    structure = parsed(page)
    assert len(structure.ids) == len(set(structure.ids))
    for name in FIGURES:
        assert f"fig-{name}" in structure.ids
        part = page[page.index(f'<section id="{name}"') :]
        part = part[: part.index("</section>")]
        terms = re.findall(r"<dt>(.*?)</dt><dd[^>]*>(.*?)</dd>", part, re.S)
        expected = ["How to read this.", "Equation"] + ["Worth"] * (name != "costs")
        assert [term for term, _ in terms] == expected
        assert all(text.strip() for _, text in terms)
    assert page.count("The numbers as a table") == len(FIGURES)


def test_verdict_comes_first_in_words():
    text = " ".join(parsed(made.page()).text)
    assert text.index("Risk: high") < text.index("Findings") < text.index("Provenance")
    assert "40 of 100" in text
    assert "step 70 of 100" in text
    assert "arisk run x.yaml" in text


def test_labels_of_near_steps_stand_below_one_another():
    near = step_lines([(14, "a"), (15, "b"), (90, "c")], 100)
    assert len({line["annotation"]["y"] for line in near}) == 3
    assert [line["annotation"]["xanchor"] for line in near] == ["left", "left", "right"]


def test_what_was_not_measured_says_so():
    page = made.page(holes=True)
    text = " ".join(parsed(page).text)
    assert "Risk: inconclusive" in text
    assert text.count("not measured") >= 8
    assert "Not measured: score.probe_points is 0. That is not the same as no risk." in text
    shown = text[text.index("Risk:") : text.index("Provenance")]
    assert not re.search(r"\b(nan|None|inf)\b", shown)


def test_text_can_be_left_out():
    page = made.page(text="a secret row", show_text=False, examples=3)
    assert "a secret row" not in page[page.index('id="samples"') : page.index('id="fisher-map"')]


def test_numbers_in_words():
    assert number(None) == number(float("nan")) == percent(None) == "not measured"
    assert number(-0.00123) == "−0.00123"
    assert number(float("inf")) == "unbounded"
    assert percent(0.004) == "< 1 %"
    assert percent(0.999) == "> 99 %"
    assert percent(1.0) == "100 %"


def toy(name, **changes):
    """A figure of one point."""
    fields = {"data": [{"type": "scatter", "name": name, "x": [0], "y": [1]}], "layout": {}}
    return Figure(
        name, f"The {name}", reading="r", equation="e", header=["x"], rows=[["1"]], **fields | changes
    )


def test_pieces_of_all_sections_stand_by_place_and_halves_share_a_row():
    late = [Piece(500, figure=toy("c")), Piece(301, figure=toy("b"), shape="half")]
    first = Section("late", pieces=late)
    second = Section(
        "early",
        pieces=[Piece(300, figure=toy("a"), shape="half"), Piece(510, "<p>below</p>", toy("d"), "half")],
    )
    html = render("t", [first, second], {})
    ids = [found for found in parsed(html).ids if found in "abcd"]
    assert ids == ["a", "b", "c", "d"]
    row = html[html.index('<div class="two">') :]
    assert row.index('id="a"') < row.index('id="b"') < row.index("</div>\n<section")
    assert html.count('<div class="two">') == 1  # a half without a neighbour stands alone
    assert html.index("<p>below</p></section>") > html.index('id="d"')
    assert list(figures_of([first, second], {}))[:4] == ["a", "b", "c", "d"]
    assert figure(html, "c")["data"][0]["name"] == "c"


def test_the_answer_opens_with_the_advice_of_all_sections():
    answer = Answer("low", lambda advice: f"<h1>{'|'.join(advice)}</h1>", ["All is well.", ""])
    sections = [Section("a", advice=["one"]), Section("b", answer=answer), Section("c", advice=["two"])]
    html = render("t", sections, {})
    assert html.index("<h1>one|two</h1>") < html.index('id="quality"')
    assert summary_markdown("t", sections).startswith("### arisk: low – t\n\nAll is well.\n")


def test_findings_quality_and_warnings_are_gathered():
    sections = [
        Section(
            "a", findings=[Finding("A", "later <b>", place=20)], quality=[("x", "1", "n")], warnings=["w"]
        ),
        Section("b", findings=[Finding("B", "sooner", "here", place=10)], warnings=["v"]),
    ]
    assert [finding.sentence for finding in findings_of(sections)] == ["sooner", "later <b>"]
    html = render("t", sections, {})
    assert (
        '<dt><a href="#here">B</a></dt><dd>sooner</dd></div><div><dt>A</dt><dd>later &lt;b&gt;</dd>' in html
    )
    assert "<td>x</td><td>1</td><td>n</td>" in html
    body = summary_json("t", sections)
    assert (body["findings"], body["warnings"]) == (["sooner", "later <b>"], ["w", "v"])
    assert 'id="findings"' not in render("t", [], {})


def test_every_finding_leads_to_a_section_of_the_page():
    page = made.page(examples=10)
    told = findings_of(made.sections(examples=10))
    assert {f.topic for f in told} >= {"Specificity", "Safety rows", "What if", "Training rows", "Overlap"}
    for finding in told:
        assert f'<section id="{finding.section}"' in page
        assert f'href="#{finding.section}"' in page
    assert summary_json("t", made.sections(examples=10))["findings"] == [f.sentence for f in told]


def test_costs_come_from_the_manifests():
    stages = {
        "a": {"seconds": 1.0, "bytes": 0},
        "b": {"seconds": 3.0, "bytes": 2e6},
        "c": {"seconds": None, "bytes": 0},
    }
    figure = stage_costs({"stages": stages})
    assert figure.says == "4 s in all; b took 75 % of it."
    assert figure.rows[2] == ["c", "not measured", "not measured", "0.0"]
    assert figure.data[0]["x"] == [3.0, 1.0]
    assert stage_costs({}).missing
    slow = {"a": {"seconds": 1000.0, "bytes": 0}, "b": {"seconds": 9000.0, "bytes": 0}}
    long = stage_costs({"stages": slow})
    assert long.says == "2 h 47 min in all; b took 90 % of it."
    assert long.data[0]["text"] == ["2 h 30 min", "17 min"]
