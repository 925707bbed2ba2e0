"""The page, the summaries, and what no text can do to them."""

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from arisk.base.artifacts import finite
from arisk.compare.text import compare_markdown
from arisk.report.figure import Figure, step_lines
from arisk.report.identity import identity, subject
from arisk.report.page import (
    Advice,
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
from arisk.report.text import LIMIT, bounded, chance, literal, number, percent
from tests.compare import plans
from tests.report import records
from tests.report import records as made
from tests.report.reading import figure, parsed
from tests.test_ci_gate import check_keys

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
    assert structure.tags.count("script") == 5
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
        assert part.count("<summary>How to read this</summary>") == 1
        assert 'class="equation"' in part
        assert ("<b>Worth.</b>" in part) == (name != "costs")
    assert page.count("The numbers as a table") == len(FIGURES)


def test_verdict_comes_first_in_words():
    text = " ".join(parsed(made.page()).text)
    assert (
        text.index("Risk: high") < text.index("What to do") < text.index("Method") < text.index("Provenance")
    )
    assert "40 of 100" in text
    assert "collapse at step 70 of 100" in text
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
    assert [chance(p) for p in (None, 0.0, 0.25, 0.995, 1.0)] == [
        "not measured",
        "< 1 %",
        "25 %",
        "> 99 %",
        "> 99 %",
    ]


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
    answer = Answer("low", lambda around: f"<h1>{around.advice}</h1>", ["All is well.", ""])
    told = [Advice(name, "run", f"--set a={name}", place) for name, place in (("d", 4), ("b", 2), ("c", 3))]
    sections = [
        Section("a", advice=told),
        Section("b", answer=answer),
        Section("c", advice=[Advice("a", place=1)]),
    ]
    html = render("t", sections, {"again": "my.yaml"})
    shown = [("a", ""), ("b", "arisk run my.yaml --set a=b"), ("c", "arisk run my.yaml --set a=c")]
    assert html.index(f"<h1>{shown}</h1>") < html.index('id="quality"')
    assert f"<h1>{[(name, '') for name, _ in shown]}</h1>" in render("t", sections, {})
    assert summary_markdown("t", sections).startswith("### arisk: low – t\n\nAll is well.\n")


def test_findings_quality_and_warnings_are_gathered():
    sections = [
        Section(
            "a", findings=[Finding("A", "later <b>", place=20)], quality=[("x", "1", "n")], warnings=["w"]
        ),
        Section("b", findings=[Finding("B", "sooner", "here", place=10)], warnings=["v", "w"]),
    ]
    assert [finding.sentence for finding in findings_of(sections)] == ["sooner", "later <b>"]
    html = render("t", sections, {})
    assert "<td>x</td><td>1</td><td>n</td>" in html
    body = summary_json("t", sections)
    assert (body["findings"], body["warnings"]) == (["sooner", "later <b>"], ["w", "v"])
    assert render("t", [], {}).count("<h1") == 0


def test_the_first_screen_gets_the_three_strongest_causes():
    told = [Finding(name, name, place=place, cause=name != "b") for place, name in enumerate("abcde")]
    answer = Answer("high", lambda around: "".join(f.topic for f in around.causes) + "!", [])
    assert "acd!" in render("t", [Section("a", findings=told, answer=answer)], {})


def test_what_is_no_decision_is_folded_away_under_one_heading():
    html = made.page(check=made.checked())
    method = html.index('<details class="level-two"')
    ids = [i for i in parsed(html).ids if f'<section id="{i}"' in html]
    before = {i for i in ids if html.index(f'<section id="{i}"') < method}
    assert before == {"forecast", "what-if", "drift", "examples", "verify"}
    assert {"truth", "rollout", "spectrum", "overlap", "worth", "quality", "provenance"} <= set(ids) - before
    text = " ".join(parsed(html).text)
    sentences = [s.strip() for s in text.split(". ") if len(s.split()) > 12]
    assert len(sentences) - len(set(sentences)) <= 2


def test_the_first_line_and_the_title_say_what_it_is_about():
    task = {
        "model": "/somewhere/SmolLM2-135M-Instruct",
        "architecture": "LlamaForCausalLM",
        "adapter": {"r": 8, "alpha": 16},
        "data": {"finetune": {"rows": 200}, "safety": {"rows": 64}},
    }
    provenance = {
        "task": task,
        "plan": {"finetune": ["data/train.jsonl"], "judge": None},
        "versions": {"arisk": "0.2"},
        "stages": {
            "a": {"seconds": 30.0, "finished": "2026-11-26T21:06:19Z", "bytes": 0, "key": "k"},
            "b": {"seconds": 11.0, "finished": "2026-11-26T20:06:19Z", "bytes": 0, "key": "k"},
        },
    }
    line = (
        "SmolLM2-135M-Instruct + LoRA r = 8 on train.jsonl, 200 rows · judged on 64 safety rows · 26 Nov "
        "2026 · "
        "arisk 0.2 · took 41 s"
    )
    assert identity(provenance) == line
    assert subject(provenance) == "SmolLM2-135M-Instruct + LoRA r = 8 on train.jsonl"
    html = render(subject(provenance), [], provenance)
    assert f"<bdi>{line}</bdi>" in html
    assert "<title>arisk: SmolLM2-135M-Instruct + LoRA r = 8 on train.jsonl</title>" in html
    assert identity({"task": {"architecture": "TinyNet"}}) == "TinyNet"
    assert identity({}) == "a model"
    whole = {"task": {"architecture": "Net", "parameters_selected": 3, "parameters_total": 3}}
    assert subject(whole) == "Net (all weights)"
    many = {"task": task, "plan": {"finetune": ["a.jsonl", "org/b", "c", "d"], "judge": "org/guard"}}
    assert identity(many) == (
        "SmolLM2-135M-Instruct + LoRA r = 8 on a.jsonl + b + 2 more, 200 rows · judged on 64 safety rows "
        "by guard"
    )


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


def test_the_documented_keys_hold_where_nothing_was_measured():
    for holes in (True, False):
        body = finite(summary_json("t", records.sections(holes=holes)))
        check_keys({"format_version": 1, **json.loads(json.dumps(body, allow_nan=False))})


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=80))
def test_any_text_stays_one_plain_line(text):
    shown = literal(text)
    assert "\n" not in shown
    assert "\r" not in shown
    assert "<" not in shown
    bare = shown
    for char in "\\`*_{}[]#|~":
        bare = bare.replace(f"\\{char}", "")
    assert not set(bare) & set("\\`*_{}[]#|~") - {"\\"}
    assert "@a" not in shown


def test_markup_mentions_and_directions_lose_their_power():
    assert literal("# a\n| b `c` @team \u202eevil") == "\\# a \\| b \\`c\\` @\u200bteam evil"
    assert literal("- a") == "\\- a"
    assert literal("1. a") == "1\\. a"
    assert literal("-0.4 and 1.5") == "-0.4 and 1.5"
    assert literal("&lt;") == "&amp;lt;"
    assert len(literal("x" * 10_000)) == 400


def test_hostile_text_cannot_break_a_summary():
    text = records.HOSTILE + "\n\n| x | y |\n# owned [link](http://x) @all"
    made = summary_markdown(text, records.sections(text=text))
    assert "<script" not in made
    assert "<img" not in made
    assert "@all" not in made
    assert "[link]" not in made
    assert made.splitlines()[0].startswith("### arisk: high – &lt;/script&gt;")
    assert not any(line.startswith("# ") for line in made.splitlines())


def test_a_summary_tells_the_answer_first_and_where_the_rest_is():
    lines = summary_markdown("t", records.sections()).splitlines()
    assert lines[0] == "### arisk: high – t"
    assert "Safe-step budget: **40 of 100 steps** · P(collapse): **90 %**" in lines[6]
    assert lines[8].startswith("- why: ")
    assert "`report.html`" in lines[-1]


def test_no_summary_outgrows_a_comment():
    long = Section("x", markdown=["y" * 1000] * 200)
    made = summary_markdown("t" * 100_000, [*records.sections(), long])
    assert len(made) <= LIMIT < 65_536
    assert "shortened" in made
    assert "`report.html`" in made.splitlines()[-1]
    runs = [plans.plan(f"run {i} " + "n" * 390) for i in range(500)]
    many = compare_markdown(plans.compared(runs))
    assert len(many) <= LIMIT
    assert "`compare.html`" in many.splitlines()[-1]


def test_two_sections_never_share_a_key():
    with pytest.raises(ValueError, match="again: verdict is in the summary already"):
        summary_json("t", [*records.sections(), Section("again", summary={"verdict": "another"})])


def test_what_fits_is_left_alone():
    assert bounded(["a", "b"], "c") == "a\nb\nc\n"


def test_findings_are_made_from_the_numbers():
    def findings(**settings):
        return summary_json("t", records.sections(**settings))["findings"]

    said = " ".join(findings(examples=10))
    assert "rows that were scored the 4 worst carry 62 %" in said  # 10 + 9 + 8 + 7 of 55
    assert "p = 0.1" in said
    assert "up to a learning rate of 0.0005 (0.5 × the plan)" in said
    assert not any("not measured of" in sentence for sentence in findings(holes=True))
    assert findings(holes=True)


def test_summaries():
    body = summary_json("t", records.sections())
    json.dumps(body)
    assert body["verdict"]["level"] == "high"
    assert body["what_if"]["rows"][1]["at_plan"]["collapse_step"] == 100
    assert body["rollout"] == {
        "gradient_evaluations": 34,
        "planned_evaluations": 100,
        "control_change": 0.08,
        "carried_out": False,
    }
    text = summary_markdown("a | b <c>", records.sections())
    assert text.startswith("### arisk: high – a \\| b &lt;c&gt;")
    assert "| local | step 70 of 100 | 90 % | 0.2 |" in text
    assert "not measured" in summary_markdown("t", records.sections(holes=True))
