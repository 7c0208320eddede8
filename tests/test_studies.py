"""Studies beside each other: one table, what was measured otherwise marked, plans and costs drawn."""
import matplotlib.pyplot as plt
import pytest
from test_notebook_kinds import ran
from training_fixtures import full_plan, tiny, token_plan

from vitlab import cli
from vitlab.models import checkpoint, compress
from vitlab.runtime.files import InputError
from vitlab.runtime.results import ResultRow, append_row
from vitlab.workbench import studies


@pytest.fixture
def two(tmp_path):
    """Two studies: a dense and a compressed model each, the second's measured in another precision."""
    dense = tiny()
    for name, plan, top1, dtype in (("first", token_plan(dense), 80.0, "float32"),
                                    ("second", full_plan(dense), 79.0, "bfloat16")):
        checkpoint.save(tmp_path / name / "small" / "checkpoint", compress(dense, plan), plan)
        for model, gmacs, lost in (("dense", 2.0, 0.0), ("small", 1.0, 1.5)):
            append_row(tmp_path / name / "results.jsonl",
                       ResultRow(model=model, dataset="photos", split="val", gmacs=gmacs, top1_pct=top1 - lost,
                                 top1_se=0.5, conditions={"dtype": dtype, "images": 100, "seed": 3}))
    return tmp_path / "first", tmp_path / "second"


def test_rows_of_two_studies_stand_in_one_table_and_what_differs_beside_them(two, capsys):
    assert cli.main(["compare", *map(str, two)]) == 0
    table = [line.split("  ") for line in capsys.readouterr().out.splitlines()]
    lines = [[cell.strip() for cell in line if cell.strip()] for line in table]
    assert lines[0] == ["model", "top1_pct", "gmacs", "measured otherwise"]
    assert lines[2] == ["first: dense", "80.00 ± 0.50", "2.0000"]
    assert lines[5] == ["second: small", "77.50 ± 0.50", "1.0000", "dtype bfloat16"]
    alike = [row for row in studies.Beside.of(two).rows if row.model.startswith("first")]
    assert studies.differing(alike) == ["", ""]


def test_plans_and_costs_are_drawn_with_the_studys_name(two, tmp_path, monkeypatch):
    from vitlab import plots
    drawn = {}
    monkeypatch.setattr(plots, "save_figure", lambda figure, folder, name, caption="": drawn.update({name: figure}))
    studies.compare([str(run) for run in two], out=str(tmp_path / "out"))
    named = {line.get_label() for line in drawn["compared"].axes[0].lines}
    assert {"first: dense", "first: small", "second: small"} <= named
    ticks = [label.get_text() for axis in drawn["plans"].axes for label in axis.get_yticklabels()]
    assert {"first: small", "second: small"} <= set(ticks)
    plt.close("all")


def test_a_notebook_shows_other_studies_beside_its_own(two, capsys):
    table = studies.Beside.of(two).table().data
    assert "<th style=\"text-align: left\">measured otherwise</th>" in table and table.count("<tr>") == 5
    assert table.count("dtype bfloat16") == 2 and ">77.50 ± 0.50</td>" in table
    ran("90_results", run=str(two[0]), others=[str(two[1])])
    assert {path.name for path in (two[0] / "compared").glob("*.png")} == {"compared.png", "plans.png"}
    (two[0] / "figures" / "11_changed.png").write_bytes((two[0] / "compared" / "plans.png").read_bytes())
    capsys.readouterr()
    ran("90_results", run=str(two[0]))
    assert "11_changed " in capsys.readouterr().out


def test_a_folder_that_is_no_study_and_one_given_twice_are_refused(two, tmp_path):
    with pytest.raises(InputError, match="given twice"):
        studies.compare([two[0], two[0]])
    with pytest.raises(InputError, match="no study"):
        studies.compare([str(two[0]), str(tmp_path / "empty")])
