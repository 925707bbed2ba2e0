import json
import math
import re
from html.parser import HTMLParser

import pytest

from arisk.anatomy.page import layer_and_type
from arisk.forecast.page import drift_map
from arisk.forecast.rollout_page import cost_text
from arisk.forecast.text import collapse_text, drift_sentence
from arisk.report.figure import step_lines
from arisk.report.summary import summary_json, summary_markdown
from arisk.report.text import number, percent
from tests.report import records as made

FIGURES = ("forecast", "what-if", "drift", "move", "samples", "fisher-map", "harm-map", "spectrum")
FIGURES += ("overlap", "costs")


class Structure(HTMLParser):
    """Tags, attributes, and text outside scripts, styles and the contents."""

    def __init__(self):
        super().__init__()
        self.quiet = ""
        self.tags, self.ids, self.text = [], [], []
        self.attributes = []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.quiet = tag if tag in ("script", "style", "nav") else self.quiet
        self.attributes += [(tag, *pair) for pair in attrs]
        self.ids += [value for key, value in attrs if key == "id"]

    def handle_endtag(self, tag):
        self.quiet = "" if tag == self.quiet else self.quiet

    def handle_data(self, data):
        if not self.quiet:
            self.text.append(data)


def parsed(html):
    structure = Structure()
    structure.feed(html)
    return structure


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


def figure(page, name):
    (text,) = re.findall(r'<script type="application/json" id="figures">(.*?)</script>', page)
    (found,) = [f for f in json.loads(text) if f["id"] == f"fig-{name}"]
    return found


def test_the_fan_leads_with_the_combined_forecast():
    traces = figure(made.page(), "forecast")["data"]
    lines = {t["name"]: t for t in traces if "name" in t}
    shown = [name for name, trace in lines.items() if trace.get("showlegend", True)]
    assert shown == ["lower bound", "local", "ray", "pilot", "rollout", "combined"]
    assert all(lines["combined"]["line"]["width"] > 2 * lines[n]["line"]["width"] for n in shown[:-1])
    assert [t["fill"] for t in traces if "fill" in t] == ["tonexty"]
    notes = [a["text"] for a in figure(made.page(), "forecast")["layout"]["annotations"]]
    assert "pilot ends at 20" in notes
    assert "planned end, 100" in notes
    assert "<b>collapse at step 70</b>" in notes
    assert (lines["local"]["x"], lines["local, not trusted"]["x"]) == ([0, 30], [30, 50, 100])
    assert lines["local"]["y"][-1] == pytest.approx(0.024)  # 30/50 of the way to 0.04
    assert lines["local, not trusted"]["opacity"] < 0.5
    assert "combined, not trusted" not in lines
    whisker = lines["collapse"]["error_x"]
    assert (whisker["arrayminus"], whisker["array"]) == ([10], [30])
    without = figure(made.page(holes=True), "forecast")
    assert {t["legendgroup"] for t in without["data"] if t.get("line", {}).get("width", 0) > 3} == {"local"}


def test_labels_of_near_steps_stand_below_one_another():
    near = step_lines([(14, "a"), (15, "b"), (90, "c")], 100)
    assert len({line["annotation"]["y"] for line in near}) == 3
    assert [line["annotation"]["xanchor"] for line in near] == ["left", "left", "right"]


def test_every_state_of_a_cell_is_told_apart():
    unknown, known, labels = figure(made.page(), "what-if")["data"]
    told = dict(zip(zip(labels["y"], labels["x"], strict=True), labels["text"], strict=True))
    rows = [[told[rate, step] for step in ("50", "100", "200")] for rate in ("0.0005", "0.001", "0.002")]
    assert rows == [[".00", ".01", ".20!"], [".01", ".20!", "?"], ["~.20!", "!", "×"]]
    assert [told[rate, "safe<br>steps"] for rate in ("0.0005", "0.001")] == ["<b>≥ 180</b>", "<b>70</b>"]
    assert known["z"][1][2] is None
    assert [row.count(None) for row in unknown["z"]] == [3, 2, 3]
    assert unknown["z"][1][2] == 1
    told = known["customdata"]
    assert "by the rollout" in told[0][0]
    assert "[−0.0005, −0.002]" in told[0][0]
    assert "rough: noise" in told[2][0]
    assert told[1][2].endswith("not measured<br>beyond")
    frames = figure(made.page(), "what-if")["layout"]["shapes"]
    assert {(f["x0"], f["y0"]) for f in frames} == {(0.5, 0.5)}
    text = " ".join(parsed(made.page()).text)
    assert "? (none)" in text


def drifting(safety, control):
    """A forecast whose rollout ends at these changes."""
    *_, forecast = made.records()
    path = made.curve("rollout", median=[0.0, safety / 2, safety])
    rest = [0.0, control / 2, control]
    return made.replaced(forecast, forecasters={**forecast.forecasters, "rollout": path}, control_change=rest)


@pytest.mark.parametrize(
    ("safety", "control", "says"),
    [
        (0.23, 0.1, "Safety rises 2.3 times as fast as the control loss: the harm is specific"),
        (0.15, 0.1, "1.5 times as fast as the control loss: 33 % of the rise is specific to safety"),
        (0.1, 0.1, "the drift is general"),
        (0.1, 0.9, "the drift is general"),
        (0.2, 0.001, "while ordinary answers stay as good: the harm is specific"),
        (0.2, -0.3, "while ordinary answers stay as good: the harm is specific"),
        (0.001, 0.0, "The safety loss does not rise (safety +0.001, control +0 nats/token at step 100"),
        (-0.2, 0.5, "does not rise, though ordinary answers get worse"),
    ],
)
def test_drift_in_words(safety, control, says):
    assert says in drift_sentence(drifting(safety, control))


def test_drift_is_judged_where_safety_is_worst_and_finite():
    forecast = drifting(0.2, 0.1)
    path = made.curve("rollout", median=[0.0, 0.4, 0.001])
    moved = made.replaced(forecast, forecasters={"rollout": path})
    assert "8 times" in drift_sentence(moved)
    assert "step 50" in drift_sentence(moved)
    path = made.curve("rollout", median=[0.0, 0.4, math.inf])
    assert "step 50" in drift_sentence(made.replaced(forecast, forecasters={"rollout": path}))


def test_drift_without_control_data_or_rollout_is_not_measured():
    *_, forecast = made.records()
    assert drift_sentence(made.replaced(forecast, control_change=None)) is None
    assert "no control data" in drift_map(made.replaced(forecast, control_change=None)).missing
    assert drift_map(made.records(holes=True)[-1]).missing == "switched off"
    lines = {t["name"]: t["y"] for t in figure(made.page(), "drift")["data"]}
    assert lines["specific to safety"][-1] == pytest.approx(lines["safety"][-1] - lines["control"][-1])


def test_the_rollout_tells_its_cost_and_its_points():
    text = " ".join(parsed(made.page()).text)
    assert "34 of 100 planned gradients, 34 %" in text
    section = made.page().split('<section id="rollout">')[1].split("</section>")[0]
    cells = re.findall(r"<td>(.*?)</td>", section)
    assert cells[:5] == ["0", "–", "1", "0", "0"]
    assert cells[-5:] == ["100", "0.75", "1", "0.2", "0.08"]
    without = made.page(holes=True)
    assert "Not measured: rollout.enabled is off. That is not the same as no risk." in without
    assert cost_text(made.records(holes=True)[-1]) == "not measured"


def test_the_method_is_told_with_its_equations():
    section = made.page().split('<section id="method">')[1].split("</section>")[0]
    for part in ("Pilot", "Leap", "Speed control", "Measurement", "What if"):
        assert f"<h3>{part}</h3>" in section
    assert section.count('class="equation"') == 5


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


@pytest.mark.parametrize("layers", [1, 80])
def test_any_number_of_layers(layers):
    assert "fig-fisher-map" in made.page(layers=layers)


def test_numbers_in_words():
    assert number(None) == number(float("nan")) == percent(None) == "not measured"
    assert number(-0.00123) == "−0.00123"
    assert number(float("inf")) == "unbounded"
    assert percent(0.004) == "< 1 %"
    assert percent(0.999) == "> 99 %"
    assert percent(1.0) == "100 %"
    assert layer_and_type("h.0.mlp.c_fc") == (0, "mlp.c_fc")
    assert collapse_text(made.curve("local", collapse_step=None)) == "none within 100 steps"
    assert collapse_text(made.missing("ray")) == "not measured"


def test_findings_are_made_from_the_numbers():
    def findings(**settings):
        return summary_json("t", made.sections(**settings))["findings"]

    said = " ".join(findings(examples=10))
    assert "the 4 worst of 10 scored fine-tuning rows carry 62 %" in said  # 10 + 9 + 8 + 7 of 55
    assert "p = 0.1" in said
    assert "up to a learning rate of 0.0005 (0.5 × the plan)" in said
    assert not any("not measured of" in sentence for sentence in findings(holes=True))
    assert findings(holes=True)


def test_summaries():
    body = summary_json("t", made.sections())
    json.dumps(body)
    assert body["verdict"]["level"] == "high"
    assert body["what_if"]["rows"][1]["at_plan"]["collapse_step"] == 100
    assert body["rollout"] == {
        "gradient_evaluations": 34,
        "planned_evaluations": 100,
        "control_change": 0.08,
    }
    text = summary_markdown("a | b <c>", made.sections())
    assert text.startswith("### arisk: high – a \\| b &lt;c&gt;")
    assert "| local | step 70 of 100 | 90 % | 0.2 |" in text
    assert "not measured" in summary_markdown("t", made.sections(holes=True))


def section(page, name):
    """Text of one section of the page."""
    start = page.index(f'<section id="{name}"')
    return " ".join(" ".join(parsed(page[start : page.index("</section>", start)]).text).split())


def figure_data(page, name):
    (found,) = re.findall(r'<script type="application/json" id="figures">(.*?)</script>', page)
    (figure,) = [figure for figure in json.loads(found) if figure["id"] == f"fig-{name}"]
    return {trace.get("name"): trace for trace in figure["data"]}


def test_a_real_run_is_laid_over_the_forecast():
    page = made.page(check=made.checked())
    text = section(page, "verify")
    assert "The real run collapses at step 56; the forecast said step 70: 1.2 times too late" in text
    assert "collapse step step 70 of 100 (60 to beyond 100) step 56" in text
    assert "× 1.25" in text
    assert "safety minus control there 0.12 0.26" in text
    assert "refusals, start → end 1 → 0 of 2" in text
    assert "2, held out" in text
    real = figure_data(page, "forecast")["real fine-tune"]
    assert (real["x"], real["y"]) == ([0, 25, 50, 75, 100], [0.0, 0.0, 0.05, 0.4, 0.3])
    drawn = figure_data(page, "truth")
    assert drawn["refusals"]["y"] == [0.5, 0.0]
    assert drawn["real control loss"]["y"] == [0.0, 0.01, 0.02, 0.03, 0.04]
    structure = parsed(page)
    assert len(structure.ids) == len(set(structure.ids))


def test_without_a_real_run_the_page_says_nothing_of_one():
    page = made.page()
    assert 'id="verify"' not in page
    assert "real fine-tune" not in json.dumps(list(figure_data(page, "forecast")))
    assert summary_json("t", made.sections())["verify"] is None
    assert "verified" not in summary_markdown("t", made.sections()).lower()


def test_a_real_run_without_texts_or_held_out_rows_says_so():
    text = section(made.page(check=made.checked(missing="verify.generate is 0")), "verify")
    assert "not measured: verify.generate is 0" in text
    assert "not held out: the forecast used the same ones" in text
    assert "rise of the control loss there 0.08 not measured" in text
    assert "What the model wrote" not in text


def test_a_real_run_that_diverged():
    check = made.checked(values=[0.0, float("inf")], steps=(0, 25), control=None, diverged_at=26)
    text = section(made.page(check=check), "verify")
    assert "unbounded" in text
    assert figure_data(made.page(check=check), "truth")["real fine-tune"]["y"] == [0.0, None]
    only = made.checked(values=[0.0], steps=(0,), control=None, diverged_at=1)
    assert "step 1 (diverged)" in section(made.page(check=only), "verify")


def test_generated_texts_are_escaped_and_can_be_left_out():
    page = made.page(check=made.checked(text=made.HOSTILE))
    assert made.HOSTILE not in page
    structure = parsed(page)
    assert structure.tags.count("script") == 4
    assert "img" not in structure.tags
    assert made.HOSTILE in "".join(structure.text)
    hidden = made.page(check=made.checked(text="a secret answer", warnings=[]), show_text=False)
    assert "a secret answer" not in hidden
    assert "1 → 0 of 2" in section(hidden, "verify")


def test_summaries_carry_the_real_run():
    check = made.checked()
    body = summary_json("t", made.sections(check=check))["verify"]
    json.dumps(body)
    assert body["real_collapse"] == 56  # √(.1), between √(.05) at 50 and √(.4) at 75
    text = summary_markdown("t", made.sections(check=check))
    assert "| collapse step | step 70 of 100 (60 to beyond 100) | step 56 |" in text
    assert "sure , here is how" not in text
