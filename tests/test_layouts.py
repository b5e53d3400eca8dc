"""records/layouts.py: what it measures, that the script's own way is among it, and its table."""

import subprocess
import sys

import layouts
import numpy as np
import pytest
import torch
import zstandard
from conftest import ROOT

import train_gpt as tg

CODES = np.array([[0, -1, 1, -2], [2, -15, 15, 0]], np.int8)


TENSORS = [
    ("c_q", "attn", 60, 31),
    ("fc", "mlp", 90, 15),
    ("proj", "mlp", 90, 15),
    ("tok_emb", "embed", 80, 127),
]


def some_tensors():
    """Matrices of two roles and a table, Gaussian."""
    g, tensors = torch.Generator().manual_seed(0), {}
    for name, role, rows, max_code in TENSORS:
        codes = (torch.randn(rows, 50, generator=g) * max_code / 5).round().clamp(-max_code, max_code)
        tensors[name] = tg.QuantizedTensor(codes.to(torch.int8), torch.ones(rows), max_code, role)
    return tensors


def cells_of(text):
    """The cells of each layout's row."""
    lines = [line for line in text.splitlines() if " | " in line]
    return {cells[0]: cells[1:] for cells in (line.strip("| ").split(" | ") for line in lines[1:])}


@pytest.fixture(scope="module")
def table():
    return cells_of(layouts.table(some_tensors()))


def size(cell):
    return int(cell.strip("*").split(" ")[0].replace(",", ""))


def test_values_are_what_their_names_say():
    assert layouts.offset(CODES, 15).tolist() == [[15, 14, 16, 13], [17, 0, 30, 15]]
    assert layouts.zigzag(CODES, 15).tolist() == [[0, 1, 2, 3], [4, 29, 30, 0]]
    assert layouts.signed(CODES, 15).tolist() == [[0, 255, 1, 254], [2, 241, 15, 0]]
    written = "".join(f"{value:05b}" for value in (15, 14, 16, 13, 17, 0, 30, 15))
    assert "".join(f"{byte:08b}" for byte in layouts.bits(CODES, 15).tolist()) == written


def test_every_layout_holds_every_code():
    """Its frames, read back by zstd, are the codes and nothing else, in some order."""
    tensors = some_tensors()
    count = sum(t.codes.numel() for t in tensors.values())
    sizes = {"c_q": 3000, "fc": 9000, "tok_emb": 4000}  # of the frames of role and width
    for layout in layouts.layouts():
        frames = layout.frames(tensors)
        if layout.rans:
            order = [sizes[name] for name in ("c_q", "tok_emb", "fc")]
            found = [tg.rans_content(*each) for each in zip(frames, order, strict=True)]
            plain = b"".join(part.read() for parts in found for part in parts)
        else:
            plain = b"".join(map(zstandard.decompress, frames))
        if layout.values is layouts.bits:
            assert 8 * len(plain) >= 6 * 3000 + 5 * 9000 + 8 * 4000 > 8 * len(plain) - 24
        else:
            assert len(plain) == count
            expected = [layout.values(t.codes.numpy(), t.max_code).ravel() for t in tensors.values()]
            assert sorted(plain) == sorted(np.concatenate(expected).tolist())


def test_columns_first_and_the_number_of_frames():
    tensors, base = some_tensors(), next(layouts.layouts())
    ways = {layout.name: layout for layout in layouts.layouts()}
    counts = {
        name: len(ways[name].frames(tensors))
        for name in (base.name, "one frame", "a frame per width", "a frame per tensor")
    }
    assert list(counts.values()) == [3, 1, 3, 4]
    first = zstandard.decompress(ways["columns first"].frames(tensors)[0])
    assert first == (tensors["c_q"].codes.mT + 31).contiguous().numpy().tobytes()


def test_bold_is_what_the_file_holds(table):
    """At least one layout of each part is the script's, and costs what its file says."""
    report = tg.byte_report(tg.pack({}, some_tensors()))
    for column, sections in ((0, ("attn.31", "mlp.15")), (1, ("embed.127",))):
        bold = [cells[column] for cells in table.values() if cells[column].startswith("**")]
        assert bold and {size(cell) for cell in bold} == {sum(report[key]["bytes"] for key in sections)}
    (own,) = (layout.name for layout in layouts.layouts() if layout.rans and layout.classes)
    assert table[own][0].startswith("**")
    for name in (
        next(layouts.layouts()).name,
        "columns first",
        "zigzag codes",
        "bits packed first",
        "a frame per tensor",
    ):
        assert not table[name][0].startswith("**")


def test_the_ratio_is_to_the_entropy_of_each_role_and_width(table):
    bounds = []
    for max_codes in ((15, 31), (127,)):
        bounds.append(0.0)
        for max_code in max_codes:
            codes = torch.cat([t.codes.flatten() for t in some_tensors().values() if t.max_code == max_code])
            share = torch.unique(codes, return_counts=True)[1].double() / codes.numel()
            bounds[-1] -= float((share * share.log2()).sum()) * codes.numel() / 8
    for cells in table.values():
        for cell, bound in zip(cells, bounds):
            ratio = float(cell.strip("*").split("(")[1].rstrip(")"))
            assert ratio == pytest.approx(size(cell) / bound, abs=1e-4)
    assert size(table["bits packed first"][0]) > 1.02 * size(table[next(layouts.layouts()).name][0])


def test_the_entropy_of_classes_is_that_of_their_columns():
    tensors = {name: t for name, t in some_tensors().items() if t.max_code == 15}
    by_hand, pooled = 0.0, {}
    for tensor in tensors.values():
        classes, _ = tg.by_class(tensor.codes, 15)
        for column, each in zip(tensor.codes.flatten(0, -2).T, classes.tolist()):
            pooled.setdefault((tensor.role, each), []).append(column)
    for columns in pooled.values():
        share = torch.unique(torch.cat(columns), return_counts=True)[1].double()
        by_hand -= float((share * (share / share.sum()).log2()).sum()) / 8
    assert layouts.entropy_bytes(tensors, classes=True) == pytest.approx(by_hand)
    assert by_hand < layouts.entropy_bytes(tensors)


def test_gaussian_codes_are_a_pr606_models(monkeypatch):
    """Names, shapes and spread, on two layers in place of eleven."""
    preset = dict(tg.PRESETS["pr606"], num_layers=2, ve_layers=(0, 1), xsa_last_n=2)
    monkeypatch.setitem(tg.PRESETS, "pr606", preset)
    codes = layouts.gaussian_codes()
    assert sum(q.codes.numel() for q in codes.values()) * 11 == 31_719_424 * 2
    assert {q.role for q in codes.values()} == {"attn", "mlp"}
    for name, q in codes.items():
        assert name.startswith(f"blocks.{'01'['.1.' in name]}.{q.role}.")
        assert q.max_code == 15 and float(q.codes.float().std()) == pytest.approx(2.86, abs=0.02)


def run(arguments, monkeypatch, capsys):
    """The command line in this process: exit status, standard output, standard error."""
    monkeypatch.setattr(sys, "argv", ["layouts.py", *map(str, arguments)])
    status = layouts.exit_status(layouts.program)
    return status, *capsys.readouterr()


def test_the_command_line(tmp_path, monkeypatch, capsys, table):
    """A run's folder or its artifact; the same table, but for the seconds."""
    (tmp_path / "artifact.bin").write_bytes(tg.pack({}, some_tensors() | {"gain": torch.ones(3)}))
    for place in (tmp_path, tmp_path / "artifact.bin"):
        status, out, _ = run([place], monkeypatch, capsys)
        assert status == 0 and out.startswith("| layout | matrices |") and "12,000 codes of matrices" in out
        sizes = {name: cells[:2] for name, cells in cells_of(out).items()}
        assert {name: cells[:2] for name, cells in table.items()} == sizes


@pytest.mark.whole
def test_the_program_starts(tmp_path):
    command = [sys.executable, str(ROOT / "records/layouts.py"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1


def test_mistakes_and_help(tmp_path, capsys, monkeypatch):
    said_to = {"--help": "layouts.py logs/RUN", "": "required", "a --gaussian": "not allowed"}
    for arguments, said in ((key.split(), said) for key, said in said_to.items()):
        monkeypatch.setattr(sys, "argv", ["layouts.py", *arguments])
        with pytest.raises(SystemExit) as stop:
            layouts.program()
        assert (stop.value.code == 0) == (arguments == ["--help"])
        printed = capsys.readouterr()
        assert said in printed.out + printed.err
    for said in ("artifact.bin is missing", "not an artifact"):
        status, out, err = run([tmp_path], monkeypatch, capsys)
        (line,) = err.splitlines()
        assert status == 1 and line.startswith("error: ") and said in line and out == ""
        (tmp_path / "artifact.bin").write_bytes(b"damaged")
