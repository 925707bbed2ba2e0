"""What predictors were worth is read from the stored benchmark."""

from arisk.forecast.worth import record_line, validity, worth_line


def test_worth_is_read_from_the_stored_benchmark():
    row = next(row for row in validity()["Fresh mixtures"] if row["name"] == "rollout")
    line = worth_line("rollout", "it")
    assert line.startswith(f"it: ρ {row['ρ final']:.2f} with the real final change, AUC {row['AUC']:.2f}")
    assert f"({row['jobs']} real fine-tunes" in line
    assert f"× {row['× step']:.2f}" in record_line("rollout")
    assert "not benchmarked" in worth_line("nobody")
    assert "not benchmarked" in record_line("nobody")
