"""What predictors were worth is read from the stored benchmark."""

import pytest

from arisk.forecast.worth import REAL, counted, record_line, validity, worth_line


def test_worth_is_read_from_the_stored_benchmark():
    row = next(row for row in validity()["Fresh mixtures"] if row["name"] == "rollout")
    line = worth_line("rollout", "it")
    assert line.startswith(f"it: ρ {row['ρ final']:.2f} with the real final change, AUC {row['AUC']:.2f}")
    assert f"({row['jobs']} real fine-tunes" in line
    assert "not benchmarked" in worth_line("nobody")


@pytest.mark.parametrize(("adapter", "optimizer"), [(None, "sgd"), ({"r": 8}, "sgd")])
def test_the_record_is_that_of_the_mode_and_optimizer(adapter, optimizer):
    name = f"{'lora' if adapter else 'full'} {optimizer}"
    row = next(row for row in validity()["Held-out verdicts by mode and optimizer"] if row["name"] == name)
    line = record_line("combined", {"optimizer": optimizer}, {"adapter": adapter})
    assert f"{row['collapsed: high']} of {row['collapsed']} (" in line
    assert f"{row['did not: high']} of {row['did not']} (" in line
    assert line == record_line("rollout", {"optimizer": optimizer}, {"adapter": adapter})
    assert ("LoRA" in line) == (adapter is not None)


@pytest.mark.parametrize(("adapter", "name"), [(None, "full adamw"), ({"r": 8}, "lora adamw")])
def test_real_models_come_first_and_trainer_s_names_are_known(adapter, name):
    row = next(row for row in validity()[REAL] if row["name"] == name)
    line = record_line("combined", {"optimizer": "adamw_torch"}, {"adapter": adapter})
    assert "real models" in line
    assert "artificial language" not in line
    missed = counted(row["lost a quarter: low"], row["lost a quarter"], least=False)
    assert f"{missed} were called low" in line
    assert f"in {counted(row['within 10 points'], row['jobs'], least=True)}." in line
    assert "has not been measured" in record_line("combined", {"optimizer": "sgd"}, {"adapter": adapter})


def test_no_record_is_said():
    assert record_line("combined", {"optimizer": "lion"}, {}).startswith(
        "No record yet of all weights with lion"
    )
    assert record_line("local", {}, {}) == worth_line("local")
    assert "not benchmarked" in record_line("nobody", {}, {})


@pytest.mark.parametrize(
    ("hits", "of", "least", "said"),
    [
        (0, 7, False, "0 of 7 (35 % at most)"),
        (48, 49, True, "48 of 49 (89 % at least)"),
        (0, 0, True, "none of none"),
    ],
)
def test_counts_stand_with_the_end_that_matters(hits, of, least, said):
    assert counted(hits, of, least=least) == said
