"""The Python API over loaders: a forecast, the truth, and the one laid over the other."""

import pytest
import torch
from torch import nn

import arisk
from arisk import AlignmentRiskPipeline, Comparison, PipelineConfig
from arisk.base.errors import ConfigError

SETTINGS = {
    "training": {"optimizer": "sgd", "learning_rate": 0.05, "max_steps": 20, "max_grad_norm": None},
    "score": {"batches": 2, "nulls": 0, "examples": 0, "probe_points": 2, "krylov_dim": 2},
    "forecast": {"bootstrap_samples": 20},
}


def loss(model, batch):
    """A foreign loss: one mean over the batch."""
    return nn.functional.mse_loss(model(batch["x"]), batch["y"])


def batches(seed, count, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    points = [torch.randn(4, 3, generator=generator, dtype=torch.float64) for _ in range(count)]
    return [{"x": x, "y": x[:, :2] + shift} for x in points]


def aligned():
    torch.manual_seed(0)
    model = nn.Linear(3, 2).double()
    with torch.no_grad():
        model.weight.copy_(torch.eye(2, 3))
        model.bias.fill_(0.1)
    return model


def loaders(model, **extra):
    return {
        "model": model,
        "safety_dataloader": batches(1, 3),
        "safety_loss_fn": loss,
        "fine_tune_dataloader": batches(2, 5, shift=1.0),
        "fine_tune_loss_fn": loss,
        **extra,
    }


def test_the_truth_over_the_forecast_of_any_module():
    model = aligned()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    pipeline = AlignmentRiskPipeline(SETTINGS)
    report = pipeline.run(**loaders(model))
    measured = arisk.verify(pipeline.task(**loaders(model)), pipeline.config)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    # A plain loop; the scalar loss of a sample is asked one sample at a time.
    plain = aligned()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.05)
    found = []
    for step in range(21):
        with torch.no_grad():
            found.append(torch.stack([loss(plain, b) for b in batches(1, 3)]).mean())
        optimizer.zero_grad()
        loss(plain, batches(2, 5, shift=1.0)[step % 5]).backward()
        optimizer.step()
    truth = torch.stack(found)[list(measured.steps)] - found[0]
    assert torch.allclose(measured.safety.mean(0), truth, rtol=1e-9, atol=1e-12)

    check = report.compare(measured)
    assert isinstance(check, Comparison)
    assert 5 <= check.real_collapse <= 20
    # A plan of twenty steps is rolled out in full: only what lies between measured points may differ.
    assert check.error_factor <= (check.real_collapse + 1) / check.real_collapse
    assert check.forecast_change == pytest.approx(check.real_change, rel=1e-6)
    assert "not held out" in report.html(check=check)
    assert 'id="verify"' not in report.html()


def test_held_out_samples_are_given_as_a_loader():
    pipeline = AlignmentRiskPipeline(SETTINGS)
    task = pipeline.task(**loaders(aligned(), heldout_dataloader=batches(7, 2)))
    measured = arisk.verify(task, pipeline.config)
    assert measured.heldout
    assert measured.safety.shape[0] == 8


def test_data_in_the_settings_of_loaders_is_refused():
    with pytest.raises(ConfigError, match="held-out rows come as"):
        PipelineConfig(verify={"safety": {"path": "x.jsonl"}})


def test_probes_are_forecast_measured_and_laid_over_each_other(tmp_path):
    """A probe of the fine-tuning rows themselves gets better, and what is told of it is a plain loop's."""
    model, learnt = aligned(), batches(2, 5, shift=1.0)
    probe = arisk.ProbeRows("learnt", "nll", arisk.SampleSet("any", iter(learnt), loss))
    pipeline = AlignmentRiskPipeline(SETTINGS)
    report = pipeline.run(**loaders(model), probes=[probe])
    again = arisk.ProbeRows("learnt", "nll", arisk.SampleSet("any", learnt, loss))
    measured = arisk.verify(pipeline.task(**loaders(model), probes=[again]), pipeline.config)
    plain = aligned()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.05)
    rows = {key: torch.cat([batch[key] for batch in learnt]) for key in ("x", "y")}
    ends = [float(loss(plain, rows).detach())]
    for step in range(20):
        optimizer.zero_grad()
        loss(plain, learnt[step % 5]).backward()
        optimizer.step()
    ends.append(float(loss(plain, rows).detach()))
    (forecast,) = report.probes
    # A plan of twenty steps is rolled out in full.
    assert [forecast.start, forecast.end[0]] == pytest.approx(ends)
    assert forecast.rows == 20
    (check,) = report.compare(measured).probes
    assert [check.start, check.real] == pytest.approx(ends)
    assert check.inside
    assert "What else the fine-tune costs" in report.html()
    assert report.to_dict()["probes"][0]["at_end"] == pytest.approx(ends[1])
    report.save(tmp_path / "kept")
    assert arisk.RiskReport.load(tmp_path / "kept").probes == report.probes
    assert pipeline.run(**loaders(model)).probes == []
    with pytest.raises(ConfigError, match="two probes are named 'learnt'"):
        pipeline.run(**loaders(model), probes=[again, again])
