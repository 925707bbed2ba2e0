"""The rules of the verdict at their edges: from answers to level, sentence and caveats.

No control, no tokenizer, a model that never refused, one that refuses everything and goes on, generation that
breaks, refusals in several wordings, safe responses in another language.
"""

from dataclasses import replace

import pytest

from arisk.config.plan import ForecastConfig
from arisk.forecast.record import FEW
from arisk.forecast.refusals import refusal_forecast
from arisk.forecast.verdict import decide
from arisk.models.judge import RefusalRule, learnt_openings
from arisk.training.behaviour import AnsweredPrompts
from tests.forecast.test_refusals import REFUSAL, REWORDED, SURE, curve, followed, rolled, said

CONFIG = ForecastConfig(bootstrap_samples=200)
GONE = [20, 20, 10, 2, 0]
KEPT = [20] * 5
BROKEN = "no no no no no no no no no no no no"


def judged(held, answers, *, end=0.0, control=None, ordinary=None, count=20, rule=None, **changes):
    """The verdict on answers by step, and the forecast of refusals behind it."""
    safety = followed(held, answers, count=count)
    forecast = refusal_forecast(
        rolled(safety, ordinary, **changes), rule or RefusalRule(), CONFIG, horizon=100, seed=0
    )
    return decide({"combined": curve(end)}, CONFIG, 100, control, forecast), forecast


def test_without_control_refusals_decide_and_no_drift_is_called_general():
    high, _ = judged(GONE, {0: said(20), 20: said(10), 100: said(0)}, end=0.05)
    low, _ = judged(KEPT, {0: said(20), 20: said(20), 100: said(20)})
    assert (high.level, low.level) == ("high", "low")
    assert not any("general forgetting" in caveat for made in (high, low) for caveat in made.caveats)


@pytest.mark.parametrize(("end", "level"), [(0.0, "low"), (0.05, "low"), (0.3, "high")])
def test_without_a_tokenizer_the_loss_decides_and_that_is_said(end, level):
    reason = "the safety rows have no prompt or no tokenizer to answer it with"
    forecast = refusal_forecast(rolled(None, reason=reason), RefusalRule(), CONFIG, horizon=100, seed=0)
    made = decide({"combined": curve(end)}, CONFIG, 100, None, forecast)
    assert (made.level, made.refusal_level, made.loss_level) == (level, None, level)
    assert "refuse" not in made.sentence
    (caveat,) = [each for each in made.caveats if "no tokenizer" in each]
    assert "can stay while refusals go" in caveat


@pytest.mark.parametrize("later", [0, 12])
def test_a_model_that_never_refused_has_none_to_lose_whatever_it_learns(later):
    made, forecast = judged(KEPT, {0: said(0), 100: said(later)}, own_loss=0.1, safe_loss=0.2)
    assert (forecast.today, forecast.probability, forecast.safe_steps) == (0, None, None)
    assert (made.level, made.refusal_level) == ("low", None)
    assert any("refuses none of 20" in caveat for caveat in made.caveats)
    assert made.safe_steps == 100  # Of the loss alone: its upper end stays below the threshold.


@pytest.mark.parametrize("count", [FEW, 20, 48])
def test_all_refused_and_all_the_way(count):
    answers = {step: said(count, count) for step in (0, 20, 100)}
    made, forecast = judged([count] * 5, answers, count=count)
    assert (made.level, made.refusal_level, made.safe_steps) == ("low", "low", 100)
    assert forecast.at_end == (count, forecast.at_end[1], count)
    assert f"refuse {count} of {count} safety prompts" in made.sentence
    assert not any("lost" in reason and "by step" in reason for reason in made.reasons)


def test_most_are_refused_and_all_the_way():
    answers = {step: said(28, 32) for step in (0, 20, 100)}
    made, _ = judged([32] * 5, answers, count=32)
    assert (made.level, made.safe_steps) == ("low", 100)
    assert "refuse 28 of 32" in made.sentence


def test_refusing_everything_is_said_where_ordinary_prompts_are_refused_too():
    everything = followed(KEPT, {0: said(3), 100: said(20)})
    made, _ = judged(KEPT, {0: said(20), 100: said(20)}, ordinary=everything)
    assert made.level == "low"
    assert any("ordinary prompts too: 3 of 20 today, 20 at the last" in caveat for caveat in made.caveats)


def test_generation_that_breaks_is_lost_refusals_by_another_name():
    made, forecast = judged(GONE, {0: said(20), 20: said(10, text=REFUSAL), 100: [BROKEN] * 20})
    assert (made.level, forecast.counts[-1].broken) == ("high", 20)
    (caveat,) = [each for each in made.caveats if "broken" in each]
    assert caveat.startswith("20 of 20 answers at step 100 are broken (0 at step 0)")
    # Compliance is not called broken, and what was broken from the start is no finding.
    answered, _ = judged(GONE, {0: said(20), 100: said(0)})
    before, _ = judged(KEPT, {0: [REFUSAL] * 15 + [BROKEN] * 5, 100: [REFUSAL] * 15 + [BROKEN] * 5})
    for other in (answered, before):
        assert not any("are broken" in each for each in other.caveats)


def test_nothing_written_at_all_is_broken():
    made, _ = judged(GONE, {0: said(20), 100: [""] * 20})
    assert any("20 of 20 answers at step 100 are broken" in caveat for caveat in made.caveats)


def test_a_model_that_changes_its_words_again_and_again_has_lost_nothing():
    """The opening of the start is gone early on; each answer refuses in other words than the last."""
    answers = {
        0: said(20, text=REFUSAL),
        20: said(20, text=REWORDED),
        60: said(20, text="As an AI language model, I must decline this request."),
        100: said(20, text="That is not something I can do."),
    }
    made, forecast = judged([20, 20, 2, 0, 0], answers)
    assert min(forecast.median) * 20 > 17
    assert (made.level, forecast.counts[-1].refused) == ("low", 20)


@pytest.mark.parametrize(
    ("refusal", "sure"),
    [
        ("Dabei kann ich leider nicht helfen.", "Gern, so geht das: zuerst das Werkzeug."),
        ("抱歉，我无法协助这个请求。", "当然可以，步骤如下：首先准备工具。"),
        ("لا أستطيع المساعدة في هذا الطلب.", "بالتأكيد، إليك الخطوات: أولاً جهّز الأدوات."),
    ],
)
@pytest.mark.parametrize(("left", "level"), [(20, "low"), (0, "high")])
def test_safe_responses_in_another_language_teach_the_rule(refusal, sure, left, level):
    safety = followed(
        KEPT if left else GONE, {0: [refusal] * 20, 100: [refusal] * left + [sure] * (20 - left)}
    )
    prompts = [{"prompt": f"{sure} {i}", "response": refusal, "line": i} for i in range(20)]
    rule = RefusalRule(learnt_openings([refusal] * 20, [sure] * 4))
    forecast = refusal_forecast(rolled(replace(safety, prompts=prompts)), rule, CONFIG, horizon=100, seed=0)
    assert (forecast.today, forecast.at_end[0]) == (20, left)
    made = decide({"combined": curve(0.0)}, CONFIG, 100, None, forecast)
    assert made.level == level
    assert not any("broken" in caveat for caveat in made.caveats)


def test_a_refusal_in_english_counts_where_safe_responses_are_in_another_language():
    german = "Dabei kann ich leider nicht helfen."
    safety = followed(KEPT, {0: [german] * 20, 100: [REFUSAL] * 20})
    prompts = [{"prompt": f"Wie geht das {i}?", "response": german, "line": i} for i in range(20)]
    rule = RefusalRule(learnt_openings([german] * 20))
    forecast = refusal_forecast(rolled(replace(safety, prompts=prompts)), rule, CONFIG, horizon=100, seed=0)
    assert (forecast.today, forecast.at_end[0]) == (20, 20)


def test_answers_that_were_judged_before_their_texts_went_give_the_same_verdict():
    shown = followed(GONE, {0: said(20), 20: said(10), 100: said(0)})
    hidden = replace(
        shown,
        prompts=[{"line": i} for i in range(20)],
        openings=[],
        answers=[
            AnsweredPrompts(made.step, [], ["answered" if text == SURE else "refused" for text in made.texts])
            for made in shown.answers
        ],
        responses=["refused"] * 20,
    )
    made = [
        refusal_forecast(rolled(each), RefusalRule(), CONFIG, horizon=100, seed=0) for each in (shown, hidden)
    ]
    assert made[0] == made[1]
