"""The first screen: the strip of the run, the answer in order, and what to do."""

import re

from arisk.forecast.first_screen import run_strip, verdict_section
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
    assert "forecast: step 70" in strip
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


def test_the_first_screen_answers_in_order():
    collected, *_, forecast = made.records()
    html = re.sub(r"<[^>]+>", " ", verdict_section(forecast, collected.task, None))
    order = ["Risk: high", "collapse at step 70", "Safe-step budget", "90 %", "What to do", "Its record on"]
    places = [html.index(part) for part in order]
    assert places == sorted(places)
    assert "learning rate 0.001 · 100 steps" in html


def test_the_first_screen_says_what_to_do_and_what_really_happened():
    collected, *_, forecast = made.records()
    real = real_run(made.checked())
    assert real.collapse_step is not None
    plain = verdict_section(forecast, collected.task, None)
    assert "Lower the peak learning rate to 0.0005: all 100 steps stay below the alarm level there." in plain
    assert f"Stop or evaluate safety by step {forecast.verdict.safe_steps}." in plain
    early = made.replaced(real, collapse_step=20, sentence="It collapsed.")
    html = verdict_section(forecast, collected.task, early)
    assert "Stop or evaluate safety by step 19." in html
    assert "too many: the real run collapsed at step 20" in html
    assert "<li>It collapsed.</li>" in html
    none = made.replaced(forecast, verdict=made.replaced(forecast.verdict, safe_steps=0))
    assert "Stop or evaluate" not in verdict_section(none, collected.task, early)
    calm = made.replaced(forecast, verdict=made.replaced(forecast.verdict, level="low", safe_steps=100))
    assert "low risk is a forecast" in verdict_section(calm, collected.task, None)
    told = verdict_section(calm, collected.task, early)
    assert "Trust the real run, not this forecast" in told
    assert "Stop or evaluate safety by step 19." in told
    assert "low risk is a forecast" not in told
    assert "arisk screen" in plain
    told = verdict_section(forecast, collected.task, None, ["Drop the <3> rows."])
    assert "<li>Drop the &lt;3&gt; rows.</li>" in told
    assert "arisk screen" not in told
    nothing = made.replaced(forecast, what_if=made.grid(holes=True))
    assert "Plan fewer steps and a lower rate together" in verdict_section(nothing, collected.task, None)
