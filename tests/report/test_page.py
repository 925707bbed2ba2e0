import importlib.util
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from arisk.report import summary_json, summary_markdown
from arisk.report.text import collapse_text, findings, layer_and_type, number, percent

spec = importlib.util.spec_from_file_location("report_records", Path(__file__).parent / "records.py")
made = importlib.util.module_from_spec(spec)
spec.loader.exec_module(made)


class Structure(HTMLParser):
    """Tags and attributes outside script and style."""

    def __init__(self):
        super().__init__()
        self.tags, self.ids, self.text = [], [], []
        self.attributes = []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attrs]
        self.ids += [value for key, value in attrs if key == "id"]

    def handle_data(self, data):
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
    assert structure.tags.count("script") == 3
    assert "img" not in structure.tags
    assert not any(key.startswith("on") for _, key, _ in structure.attributes)
    assert made.HOSTILE not in page
    (figures,) = re.findall(r'<script type="application/json" id="figures">(.*?)</script>', page)
    json.loads(figures)


def test_ids_are_unique_and_every_figure_reads():
    page = made.page()
    structure = parsed(page)
    assert len(structure.ids) == len(set(structure.ids))
    for figure in ("forecast", "what-if", "move", "spectrum", "fisher-map", "harm-map", "overlap"):
        assert f"fig-{figure}" in structure.ids
    assert page.count("How to read this.") >= 9
    assert page.count("The numbers as a table") == 7


def test_verdict_comes_first_in_words():
    text = " ".join(parsed(made.page()).text)
    assert text.index("Risk: high") < text.index("Findings") < text.index("Provenance")
    assert "40 of 100" in text
    assert "step 70 of 100" in text
    assert "arisk run x.yaml" in text


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
    examples = page[page.index('id="examples"') : page.index('id="fisher-map"')]
    assert "a secret row" not in examples


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
    collected, space, scored, forecast = made.records(examples=10)
    said = " ".join(findings(collected, space, scored, forecast))
    assert "4 of 10 scored fine-tuning rows carry 62 %" in said  # 10 + 9 + 8 + 7 of 55
    assert "p = 0.1" in said
    assert "up to a learning rate of 0.0005 (0.5 × the plan)" in said
    assert findings(*made.records(holes=True))


def test_summaries():
    body = summary_json(*made.records(), title="t")
    json.dumps(body)
    assert body["verdict"]["level"] == "high"
    text = summary_markdown(*made.records(), title="a | b <c>")
    assert text.startswith("### arisk: high – a \\| b &lt;c>")
    assert "| local | step 70 of 100 | 90 % | 0.2 |" in text
    assert "not measured" in summary_markdown(*made.records(holes=True), title="t")
