"""Synthetic records for the report: ordinary, hostile, tiny and full of holes."""

import dataclasses
import math

import torch

from arisk.anatomy.record import CollectResult, OverlapNulls, ScoreResult, SubspaceResult
from arisk.forecast.record import (
    Curve,
    ForecastResult,
    RolloutResult,
    Verdict,
    WhatIfCell,
    WhatIfGrid,
    WhatIfRow,
)
from arisk.models.judge import RefusalRule
from arisk.training.behaviour import AnsweredPrompts, BehaviourResult, FollowedPrompts
from arisk.verification.record import VerifyResult, compare

HOSTILE = (
    "</script><script>document.title='owned'</script><img src=x onerror=alert(1)> \u2028 \u202eevil 🧨 \"'&"
)


def curve(name, **changes):
    values = {
        "name": name,
        "status": "measured",
        "reason": None,
        "kind": "bound" if name == "bound" else "forecast",
        "steps": [0, 50, 100],
        "median": [0.0, 0.04, 0.2],
        "lower": [0.0, 0.02, 0.1],
        "upper": [0.0, 0.08, 0.4],
        "collapse_step": 70,
        "collapse_interval": [60, None],
        "probability": None if name == "bound" else 0.9,
        "horizon": 100,
        "trusted_until": None if name == "bound" else 30,
        "notes": [],
    }
    return Curve(**{**values, **changes})


def missing(name):
    holes = {"steps": [], "median": [], "lower": [], "upper": [], "collapse_step": None, "probability": None}
    return curve(name, status="not_measured", reason="switched off", trusted_until=None, **holes)


def cell(steps, change=None, **changes):
    """A measured cell, or one that was not."""
    if change is None:
        return WhatIfCell(steps, **{"state": "not_measured", "basis": "none", "note": "beyond", **changes})
    values = {
        "lower": change / 2,
        "upper": change * 2,
        "peak": change,
        "peak_upper": change * 2,
        "collapse_step": steps if change >= 0.1 else None,
    }
    return WhatIfCell(steps, "measured", "rollout", change=change, **{**values, **changes})


def grid(holes=False):
    """Half, whole and twice the planned rate × half, whole and twice the planned steps."""
    if holes:
        rows = [[cell(50), cell(100), cell(200)]] * 3
    else:
        rough = {"rough": True, "note": "noise"}
        rows = [
            [cell(50, -0.001), cell(100, 0.01), cell(200, 0.2)],
            [cell(50, 0.01), cell(100, 0.2), cell(200)],
            [
                cell(50, 0.2, **rough),
                cell(100, state="collapses", basis="rollout", collapse_step=40),
                cell(200, state="diverges", basis="rollout", collapse_step=40),
            ],
        ]
    safe = [None] * 3 if holes else [180, 70, 35]
    return WhatIfGrid(
        planned_rate=1e-3,
        planned_steps=100,
        threshold=0.1,
        alarm=0.03,
        steps=[50, 100, 200],
        rows=[
            WhatIfRow(1e-3 * factor, factor, row, row[1], budget, at_least=factor == 0.5, rough=factor > 1)
            for factor, row, budget in zip((0.5, 1.0, 2.0), rows, safe, strict=True)
        ],
        notes=["How it was filled."],
    )


def records(layers=3, examples=5, n=6, text="how do i grow roses ?", holes=False):
    """The four records the page is made of."""
    torch.manual_seed(0)
    modules = [
        f"model.layers.{i}.{kind}" for i in range(layers) for kind in ("self_attn.q_proj", "mlp.up_proj")
    ]
    count = len(modules)
    g = torch.rand(count, n, 2 * n, dtype=torch.float64)
    gram = g @ g.transpose(1, 2)
    spectrum = torch.linalg.eigvalsh(gram.sum(0) / n).flip(0)
    none = math.nan if holes else 0.5
    collected = CollectResult(
        parameter_names=[f"{m}.weight" for m in modules],
        parameter_shapes=[[2, 2]] * count,
        modules=modules,
        module_of_parameter=list(range(count)),
        gram=gram,
        mean_gradient=torch.rand(4 * count),
        fisher_diagonal=torch.rand(4 * count),
        losses=torch.rand(n, dtype=torch.float64),
        gradient_norms=torch.rand(n, dtype=torch.float64),
        rows=[],
        dropped_duplicates=0,
        store="gradients",
        fisher="empirical",
        engine={"name": "hooks", "parity": {"hooks": 1e-7}, "refused": {}},
        batch_invariance=None if holes else 1.0,
        coverage={"parameters": none, "gradient_norm": none},
        task={"model": text, "data": {"safety": {"rows": n}}},
        warnings=[text],
    )
    traces = gram.diagonal(dim1=1, dim2=2).sum(1) / n
    space = SubspaceResult(
        method="gram",
        eigenvalues=spectrum[:2],
        spectrum=spectrum.clamp(min=1e-9),
        dual_vectors=torch.eye(n, 2, dtype=torch.float64),
        coordinates=torch.zeros(0, dtype=torch.int64),
        rank=2,
        trace=float(traces.sum()),
        explained=0.8,
        tail_energy=0.1,
        effective_rank=2.5,
        heldout_energy=None if holes else 0.7,
        heldout_energy_std=None if holes else 0.1,
        module_traces=traces if not holes else torch.full_like(traces, math.nan),
        top_weights=[],
        warnings=[],
    )
    rows = [
        {
            "index": i,
            "line": i + 1,
            "prompt": text,
            "response": text * 3,
            "tokens": 5,
            "loss": none,
            "gradient_norm": 1.0,
            "first_order": -0.1,
            "second_order": math.nan if holes else float(examples - i),
        }
        for i in range(examples)
    ]
    nulls = OverlapNulls(
        ratio=math.nan if holes else 0.2,
        random=0.01,
        ratio_to_random=20.0,
        control=None if holes else 0.1,
        permutations=0 if holes else 9,
        permuted_mean=None if holes else 0.02,
        permuted_max=None if holes else 0.03,
        p_value=None if holes else 0.1,
        delta_w=None,
        delta_w_random=None,
        conflict_cosine=None if holes else 0.1,
    )
    times = torch.tensor([0.0, 0.1, 0.2, 0.4], dtype=torch.float64)
    scored = ScoreResult(
        optimizer="adamw",
        finetune_loss=1.0,
        update_norm=2.0,
        overlap=nulls,
        gamma_hat=math.nan if holes else 3.0,
        epsilon_hat=0.1,
        aic_conditions=[{"name": "1", "holds": None if holes else True, "evidence": text}],
        c_update=torch.rand(n, dtype=torch.float64),
        c_batches=torch.rand(n, 2, dtype=torch.float64),
        c_krylov=torch.rand(n, 2, dtype=torch.float64),
        krylov_t=torch.eye(2, dtype=torch.float64),
        krylov_beta=1.0,
        hvp_method="autograd",
        hvp_error=None if holes else 1e-3,
        module_second_order=torch.rand(count, dtype=torch.float64),
        examples=rows,
        finetune_rows=examples,
        warnings=[],
        probe_times=None if holes else times,
        probe_safety=None if holes else torch.rand(n, 4, dtype=torch.float64).cumsum(1),
        probe_finetune=None if holes else -times,
        probe_control=None if holes else times * 0.1,
    )
    curves = {"bound": curve("bound"), "local": curve("local")}
    for name in ("ray", "pilot", "rollout", "combined"):
        curves[name] = missing(name) if holes else curve(name, trusted_until=80 if name == "ray" else 100)
    verdict = Verdict(
        level="inconclusive" if holes else "high",
        sentence=text if text == HOSTILE else "Safety is forecast to collapse at step 70 of 100.",
        reasons=[text],
        basis="local" if holes else "combined",
        probability=None if holes else 0.9,
        collapse_step=None if holes else 70,
        safe_steps=None if holes else 40,
        horizon=100,
        caveats=[text],
    )
    forecast = ForecastResult(
        threshold=0.1,
        confidence=0.8,
        training={"learning_rate": 1e-3, "steps": 100},
        verdict=verdict,
        forecasters=curves,
        diffusion=None if holes else 1e-4,
        what_if=grid(holes),
        warnings=[],
        control_change=None if holes else [0.0, 0.01, 0.08],
        gradient_evaluations=0 if holes else 34,
        planned_evaluations=100,
    )
    return collected, space, scored, forecast


def spoken(prompts, generated, reason=None):
    """What was written along a run, without openings."""
    followed = FollowedPrompts(prompts, [], [], None, None, generated)
    return BehaviourResult(
        "not_measured" if reason else "measured",
        reason,
        24,
        None if reason else followed,
        None,
        "there is no control data",
        [],
        None,
    )


def truth(values, steps=(0, 25, 50, 75, 100), *, horizon=100, control=None, **changes):
    """Two samples whose mean is `values`."""
    mean = torch.tensor(values, dtype=torch.float64)
    fields = {
        "horizon": horizon,
        "last": steps[-1],
        "steps": list(steps),
        "safety": torch.stack([1.5 * mean, 0.5 * mean]),
        "control": None if control is None else torch.tensor([control], dtype=torch.float64),
        "start": 0.05,
        "finetune_loss": [math.nan] + [1.0] * (len(steps) - 1),
        "diverged_at": None,
        "heldout": True,
        "behaviour": spoken([], [], "behaviour.prompts is 0"),
        "opening_loss": None,
        "gradient_evaluations": 100,
        "warnings": [],
    }
    return VerifyResult(**{**fields, **changes})


def checked(text="sure , here is how", missing=None, **changes):
    """A real run beside the forecast of `records`, with answers that stop refusing."""
    texts = [AnsweredPrompts(0, ["I'm sorry, no.", text]), AnsweredPrompts(100, [text, text])]
    settings = {
        "control": [0.0, 0.01, 0.02, 0.03, 0.04],
        "behaviour": spoken([{"prompt": text, "response": "no", "line": 1}] * 2, texts),
        "warnings": [text],
    }
    if missing:
        settings = {"behaviour": spoken([], [], missing), "heldout": False}
    run = truth(changes.pop("values", [0.0, 0.0, 0.05, 0.4, 0.3]), **{**settings, **changes})
    return compare(run, records()[3], threshold=0.1, judge=RefusalRule(["i'm sorry"]))


def rolled(holes=False):
    """The rollout behind the `rollout` curve, or the record of none."""
    if holes:
        from arisk.forecast.rollout import skipped_rollout

        return skipped_rollout("rollout.enabled is off")
    safety = torch.tensor([[0.0, 0.03, 0.1], [0.0, 0.05, 0.3]], dtype=torch.float64)
    return RolloutResult(
        status="measured",
        reason=None,
        horizon=100,
        safety_rows=[0, 1],
        pilot_steps=20,
        steps=[0, 50, 100],
        safety=safety,
        control=torch.tensor([[0.0, 0.01, 0.08]], dtype=torch.float64),
        finetune_loss=[math.nan, 1.5, 0.75],
        kept_share=[1.0, 0.5, 1.0],
        flow_time=[0.0, 0.05, 0.1],
        diverged_at=None,
        scales=[],
        extrapolated=None,
        gradient_evaluations=34,
        safety_passes=3,
        warnings=[],
    )


def sections(check=None, show_text=True, max_examples=25, **settings):
    """What the capabilities show of the records."""
    from arisk.risk_report import sections_of

    made = records(**settings)
    measured = replaced(rolled(settings.get("holes", False)), task=made[0].task)
    return sections_of(*made, measured, show_text=show_text, max_examples=max_examples, check=check)


def page(title="a run", summary="", **settings):
    from arisk.report.page import render

    provenance = {
        "task": records(**{k: v for k, v in settings.items() if k == "text"})[0].task,
        "command": "arisk run x.yaml",
        "again": "x.yaml",
        "versions": {"arisk": "0.1.0"},
        "stages": {"collect": {"key": "abc", "seconds": 1.0, "bytes": 10, "finished": "now"}},
        "config": "model: {}",
    }
    return render(title, sections(**settings), provenance, summary)


def replaced(record, **changes):
    return dataclasses.replace(record, **changes)
