"""Summaries: documented keys where nothing was measured, hostile text, and the length of a comment."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from arisk.base.artifacts import finite
from arisk.compare.text import compare_markdown
from arisk.report.page import Section, summary_json, summary_markdown
from arisk.report.text import LIMIT, bounded, literal
from tests.compare import plans
from tests.report import records
from tests.test_ci_gate import check_keys


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
    assert "the 4 worst of 10 scored fine-tuning rows carry 62 %" in said  # 10 + 9 + 8 + 7 of 55
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
