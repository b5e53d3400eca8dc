"""records/steps.py: a row for every variant, each of which changes what is packed; nothing stays replaced."""

import re
import sys

import pytest
import steps
from conftest import run_here

import train_gpt as tg


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    """A tiny model, trained without QAT."""
    place = tmp_path_factory.mktemp("steps")
    assert run_here(place, tiny | {"STAGES": "train", "LATE_QAT_THRESHOLD": "0", "RUN_ID": "run"}) == 0
    return place / "logs/run"


def run(arguments, monkeypatch, capsys):
    """The command line in this process: exit status, standard output, standard error."""
    monkeypatch.setattr(sys, "argv", ["steps.py", *map(str, arguments)])
    status = steps.exit_status(steps.program)
    return status, *capsys.readouterr()


@pytest.mark.slow
def test_every_variant_changes_the_file(folder, monkeypatch, capsys):
    kept = {name: getattr(tg, name) for name in ("water_columns", "inverse_cholesky", "act_order")}
    rule, kinds = tg.STEP_RULES["water"], {}
    for name, (which, change) in steps.VARIANTS.items():  # the last of each kind
        kinds[which, getattr(change, "func", change)] = name
    monkeypatch.setattr(
        steps, "VARIANTS", {name: what for name, what in steps.VARIANTS.items() if name in kinds.values()}
    )
    fit, files = tg.fit_artifact, []

    def watched(*given):
        found = fit(*given)
        files.append(found[0])
        return found

    monkeypatch.setattr(tg, "fit_artifact", watched)
    status, out, _ = run([folder, "--bits", "5"], monkeypatch, capsys)
    assert status == 0
    lines = [line.strip("| ").split(" | ") for line in out.splitlines()]
    costs = {cells[0]: float(cells[-2]) for cells in lines[2:]}
    assert costs.keys() == steps.VARIANTS.keys() and lines[0][1] == "seed 1337"
    assert len({*files}) == len(files) == len(costs) == 9
    assert re.fullmatch(r"[-+]0\.\d{5}", lines[2][-2]) and lines[2][-1] == "1.00"
    assert all(getattr(tg, name) is function for name, function in kept.items())
    assert tg.STEP_RULES["water"] is rule


def test_every_way_of_the_tables_changes_the_cost(folder, monkeypatch, capsys):
    some = ("absmax", "water, tables int8", "water")
    monkeypatch.setattr(steps, "FILES", {name: steps.FILES[name] for name in some})
    status, out, _ = run([folder, "--bytes", "86000"], monkeypatch, capsys)
    costs = {
        cells[0]: float(cells[-2])
        for cells in (line.strip("| ").split(" | ") for line in out.splitlines()[2:])
    }
    assert status == 0 and costs.keys() == steps.FILES.keys()
    assert len({*costs.values()}) == len(costs), costs
    assert costs["water"] < min(costs["absmax"], costs["water, tables int8"])


def test_mistakes(folder, tmp_path, monkeypatch, capsys):
    (tmp_path / "result.json").write_text((folder / "result.json").read_text())
    for arguments, said in (
        ([folder.parent], "has no result.json"),
        ([tmp_path], "no run of STAGES=train"),
        ([folder, "--bits", "0"], "between 1 and 8"),
    ):
        status, out, err = run(arguments, monkeypatch, capsys)
        assert status == 1 and out == "" and err.startswith("error: ") and said in err
