"""A real run on the page: over the forecast, with its holes, and with its texts kept back."""

import json

from arisk.report.page import summary_json, summary_markdown
from tests.report import records as made
from tests.report.reading import parsed, section_text, traces


def test_a_real_run_is_laid_over_the_forecast():
    page = made.page(check=made.checked())
    text = section_text(page, "verify")
    assert "The real run collapses at step 56; the forecast said step 70: 1.2 times too late" in text
    assert "collapse step step 70 of 100 (60 to beyond 100) step 56" in text
    assert "× 1.25" in text
    assert "difference: specific to safety 0.12 0.26" in text
    assert "refusals, start → end not measured 1 → 0 of 2" in text
    assert "2, held out" in text
    real = traces(page, "forecast")["real fine-tune"]
    assert (real["x"], real["y"]) == ([0, 25, 50, 75, 100], [0.0, 0.0, 0.05, 0.4, 0.3])
    drawn = traces(page, "truth")
    assert drawn["refusals"]["y"] == [0.5, 0.0]
    assert drawn["real control loss"]["y"] == [0.0, 0.01, 0.02, 0.03, 0.04]
    structure = parsed(page)
    assert len(structure.ids) == len(set(structure.ids))


def test_without_a_real_run_the_page_says_nothing_of_one():
    page = made.page()
    assert 'id="verify"' not in page
    assert "real fine-tune" not in json.dumps(list(traces(page, "forecast")))
    assert summary_json("t", made.sections())["verify"] is None
    assert "verified" not in summary_markdown("t", made.sections()).lower()


def test_a_real_run_without_texts_or_held_out_rows_says_so():
    text = section_text(made.page(check=made.checked(missing="behaviour.prompts is 0")), "verify")
    assert "not measured: behaviour.prompts is 0" in text
    assert "not held out: the forecast used the same ones" in text
    assert "rise of the loss of ordinary answers there 0.08 not measured" in text
    assert "What the model wrote" not in text


def test_a_real_run_that_diverged():
    check = made.checked(values=[0.0, float("inf")], steps=(0, 25), control=None, diverged_at=26)
    text = section_text(made.page(check=check), "verify")
    assert "unbounded" in text
    assert traces(made.page(check=check), "truth")["real fine-tune"]["y"] == [0.0, None]
    only = made.checked(values=[0.0], steps=(0,), control=None, diverged_at=1)
    assert "none before it diverged at step 1" in section_text(made.page(check=only), "verify")


def test_generated_texts_are_escaped_and_can_be_left_out():
    page = made.page(check=made.checked(text=made.HOSTILE))
    assert made.HOSTILE not in page
    structure = parsed(page)
    assert structure.tags.count("script") == 5
    assert "img" not in structure.tags
    assert made.HOSTILE in "".join(structure.text)
    hidden = made.page(check=made.checked(text="a secret answer", warnings=[]), show_text=False)
    assert "a secret answer" not in hidden
    assert "1 → 0 of 2" in section_text(hidden, "verify")


def test_summaries_carry_the_real_run():
    check = made.checked()
    body = summary_json("t", made.sections(check=check))["verify"]
    json.dumps(body)
    assert body["real_collapse"] == 56  # √(.1), between √(.05) at 50 and √(.4) at 75
    text = summary_markdown("t", made.sections(check=check))
    assert "| collapse step | step 70 of 100 (60 to beyond 100) | step 56 |" in text
    assert "sure , here is how" not in text
