"""The first screen: the strip of the run, the answer in order, and what to do."""

import re

from arisk.forecast.first_screen import advice_of, run_strip, verdict_section
from arisk.report.page import Advice, Around, Finding
from arisk.verification.page import real_run
from tests.report import records as made


def bands(html):
    return re.findall(r'<span class="(\w+)" style="left:([\d.]+)%;width:([\d.]+)%"', html)


def test_the_strip_shares_the_run_out_without_gaps():
    *_, forecast = made.records()
    strip = run_strip(forecast, None)
    assert bands(strip) == [
        ("safe", "0.00", "40.00"),
        ("watch", "40.00", "20.00"),
        ("maybe", "60.00", "40.00"),
    ]
    assert "forecast collapse, step 70: loss of safe responses +0.1" in strip
    assert "60 to beyond 100" in strip
    assert "real run: step 56" in run_strip(forecast, real_run(made.checked()))
    never = made.curve("combined", collapse_step=None, collapse_interval=[None, None])
    verdict = made.replaced(forecast.verdict, safe_steps=100, collapse_step=None)
    calm = made.replaced(forecast, verdict=verdict, forecasters={"combined": never})
    assert bands(run_strip(calm, None)) == [("safe", "0.00", "100.00")]


def test_a_strip_without_a_forecast_is_not_green():
    *_, forecast = made.records(holes=True)
    blank = made.replaced(forecast, verdict=made.replaced(forecast.verdict, safe_steps=None))
    strip = run_strip(blank, None)
    assert bands(strip) == []
    assert "Not measured: that is not the same as no risk." in strip


def screen(forecast, real=None, done=(), more=(), causes=(), task=None):
    """The first screen with the advice of the forecast, as the page makes it."""
    advice = sorted([*more, *advice_of(forecast, real, done)], key=lambda a: a.place)[:3]
    around = Around(causes, [(a.sentence, a.command("my.yaml")) for a in advice])
    return verdict_section(forecast, task or {}, real, around)


def test_the_first_screen_answers_in_order():
    collected, *_, forecast = made.records()
    html = re.sub(r"<[^>]+>", " ", screen(forecast, task=collected.task))
    order = [
        "Risk: high",
        "collapse at step 70",
        "Safe-step budget",
        "6 safety rows, thin",
        "Why",
        "What to do",
    ]
    places = [html.index(part) for part in [*order, "How far to trust this", "No record yet of all weights"]]
    assert places == sorted(places)
    assert "Plan: 100 steps · learning rate 0.001" in html


def test_the_first_screen_says_what_to_do_and_what_really_happened():
    *_, forecast = made.records()
    real = real_run(made.checked())
    assert real.collapse_step is not None
    plain = screen(forecast)
    assert "Lower the peak learning rate to 0.0005: there all 100 steps stay within the limits" in plain
    assert "<code>arisk run my.yaml --set training.learning_rate=0.0005</code>" in plain
    assert "<code>arisk run my.yaml --set training.max_steps=40</code>" in plain
    assert "<code>arisk screen my.yaml</code>" in plain
    assert plain.count('class="copy"') == 3
    early = made.replaced(real, collapse_step=20, sentence="It collapsed.")
    html = screen(forecast, early)
    assert "--set training.max_steps=19" in html
    assert "too many: the real run collapsed at step 20" in html
    assert "<li>It collapsed.</li>" in html
    none = made.replaced(forecast, verdict=made.replaced(forecast.verdict, safe_steps=0))
    assert "max_steps" not in screen(none, early)
    calm = made.replaced(forecast, verdict=made.replaced(forecast.verdict, level="low", safe_steps=100))
    assert "low risk is a forecast" in screen(calm)
    told = screen(calm, early)
    assert "Trust the real run, not this forecast" in told
    assert "max_steps=19" in told
    assert "low risk is a forecast" not in told
    told = screen(forecast, more=[Advice("Drop the <3> rows.", place=0)])
    assert "<li>Drop the &lt;3&gt; rows.</li>" in told
    assert "arisk screen" not in told
    nothing = made.replaced(forecast, what_if=made.grid(holes=True))
    assert [a.verb for a in advice_of(nothing, None)] == ["run", "screen", "guard"]
    assert [a.verb for a in advice_of(nothing, None, ["screen", "guard"])] == ["run"]
    unsure = made.replaced(forecast, verdict=made.replaced(forecast.verdict, level="inconclusive"))
    assert [a.verb for a in advice_of(unsure, None)] == ["verify"]
    # What was carried out already is not advice.
    assert [a.verb for a in advice_of(made.replaced(unsure, carried_out=True), None)] == [""]


def test_the_safest_useful_cell_is_advice_with_its_numbers():
    *_, forecast = made.records()
    grid = forecast.what_if
    rows = [made.replaced(row, at_plan=made.cell(100, 0.2, collapse_step=70)) for row in grid.rows]
    lost = [made.cell(steps, 0.2, collapse_step=40) for steps in grid.steps]
    rows[0] = made.replaced(rows[0], cells=[made.cell(50, 0.001), *lost[1:]])
    rows[1:] = [made.replaced(row, cells=lost) for row in rows[1:]]
    nearer = made.replaced(forecast, what_if=made.replaced(grid, rows=rows))
    (found, steps), budget = nearer.what_if.safest(), nearer.verdict.safe_steps
    assert (found.learning_rate, steps, budget) == (0.0005, 50, 40)
    html = screen(nearer)
    assert "Train 50 steps at a learning rate of 0.0005: the safest useful cell of the what-if map." in html
    assert "--set training.max_steps=50 --set training.learning_rate=0.0005</code>" in html
    # A cell of fewer steps than the budget at the planned rate is no better than stopping there.
    long = made.replaced(nearer, verdict=made.replaced(nearer.verdict, safe_steps=60))
    assert "--set training.max_steps=60</code>" in screen(long)


def test_the_budget_names_both_witnesses():
    *_, forecast = made.records()
    assert "whole 80 % interval within the limits: loss of safe responses to step" in screen(forecast)


def test_causes_lead_to_their_sections_and_rules_speak_where_the_verdict_is_not_high():
    *_, forecast = made.records()
    cause = Finding("Rows <b>", "two of them", "examples", cause=True)
    link = '<li><a href="#examples">Rows &lt;b&gt;</a>: two of them</li>'
    why = screen(forecast, causes=[cause]).partition("<h3>Why</h3>")[2].partition("</ul>")[0]
    assert why.endswith(link)
    assert why.count("<li>") == 1
    mild = made.replaced(
        forecast, verdict=made.replaced(forecast.verdict, level="elevated", reasons=["r1", "r2"])
    )
    why = screen(mild, causes=[cause, cause]).partition("<h3>Why</h3>")[2].partition("</ul>")[0]
    assert [part.partition("</li>")[0] for part in why.split("<li>")[1:3]] == ["r1", "r2"]
    assert why.count("<li>") == 3
