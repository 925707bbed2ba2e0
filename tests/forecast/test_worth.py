"""What predictors were worth is read from the stored benchmark."""

from arisk.forecast.worth import record_line, validity, worth_line


def test_worth_is_read_from_the_stored_benchmark():
    row = next(row for row in validity()["Fresh mixtures"] if row["name"] == "rollout")
    line = worth_line("rollout", "it")
    assert line.startswith(f"it: ρ {row['ρ final']:.2f} with the real final change, AUC {row['AUC']:.2f}")
    assert f"({row['jobs']} real fine-tunes" in line
    counts = {row["name"]: row for row in validity()["Fresh mixtures: verdicts"]}
    high, collapsed = counts["high"], sum(row["collapsed"] for row in counts.values())
    assert f"{high['collapsed']} of {collapsed} real collapses were called high" in record_line("rollout")
    assert f"{high['did not']} of " in record_line("combined")
    assert record_line("local") == worth_line("local")
    assert "not benchmarked" in worth_line("nobody")
    assert "not benchmarked" in record_line("nobody")
