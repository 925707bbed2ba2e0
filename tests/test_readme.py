"""The README and the report show the stored result of the validity benchmark, number for number."""

import json

from arisk.forecast.worth import worth
from tests.bench.validity.readme import BEGIN, END, README, STORED, block, number


def test_the_readme_shows_the_stored_result():
    text = README.read_text(encoding="utf-8")
    shown = text[text.index(BEGIN) + len(BEGIN) : text.index(END)]
    assert shown == block(json.loads(STORED.read_text(encoding="utf-8")))


def test_the_report_shows_the_stored_result():
    tables = json.loads(STORED.read_text(encoding="utf-8"))
    page = worth()
    for row in tables["Fresh mixtures"]:
        assert f"<td>{number(row['ρ final'])}</td><td>{number(row['AUC'])}</td>" in page.replace(
            ' class="num"', ""
        ), row["name"]
