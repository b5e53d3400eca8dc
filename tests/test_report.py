"""records/report.py: what the page says of one and of several runs, and how a browser shows it."""

import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import audit
import matplotlib.image
import numpy as np
import pytest
import report
import runs as shared
from conftest import run_here
from matplotlib import pyplot as plt

CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "chrome")
BROWSER = next((path for name in CHROMIUM if (path := shutil.which(name))), None)
TOKENS, BYTES, STEPS = 251_392, 724_039, 200
TECHNIQUES = {"artifact_sha256": "beef", "techniques": {"xsa": {"loss": 3.0, "loss_without": 3.25}}}


def result_of(**changes) -> dict:
    """A finished run of 200 steps with everything on."""
    clock = {"limit": 600.0, "within": True}
    kinds = ("attn.c_q", "attn.c_k", "attn.c_v", "attn.proj", "mlp.fc", "mlp.proj")
    matrices = {f"blocks.{n}.{kind}.weight": [2.0, 2.0 * (0.3 + 0.1 * n)] for n in range(3) for kind in kinds}
    errors = {"error_rounding": 4.0, "error": 1.6, "floored_rows": 0}
    result = {
        "preset": "smoke", "seed": 1337, "corpus": "A corpus", "changed": {"matrix_lr": 0.031},
        "params": 785_698, "steps": STEPS, "step_ms": 97.4, "tokens_seen": 819_200, "val_tokens": TOKENS,
        "val_bytes": BYTES, "hardware": "device:1x A GPU threads:1", "world_size": 1,
        "script_sha256": "c0ffee", "peak_memory": 2**30,
        "bpb": {"float": 1.6231, "roundtrip": 1.6242, "sliding": 1.5307, "ttt": 1.5092},
        "val_loss": {"float": 3.2404, "roundtrip": 3.2426, "sliding": 3.0556, "ttt": 3.0125},
        "artifact": {
            "model_bytes": 900_000, "code_bytes": 100_000, "total_bytes": 1_000_000, "limit": 16_000_000,
            "sections": {"attn.15": {"bytes": 300_000, "plain_bytes": 800_000},
                         "embed.127": {"bytes": 595_000, "plain_bytes": 900_000},
                         "raw.float16": {"bytes": 4_000, "plain_bytes": 4_000},
                         "header": {"bytes": 1_000}},
            "sha256": "beef"},
        "budget": {
            "training": clock | {"used": 598.0, "uncounted": {"warm-up": 3.0},
                                 "counted": {"train": 590.0, "calibrate": 8.0}},
            "evaluation": clock | {"used": 540.0, "uncounted": {}, "counted": {"ttt": 540.0}}},
        "proofs": {
            "qat": {"first_step": 150, "distance_before": 0.248, "distance_raw": 0.154, "loss": 3.0,
                    "loss_rounded": 3.004},
            "averaging": {"exported": "ema", "distance_from_raw": 0.0386},
            "quantizer": {"attn": errors, "mlp": errors, "matrices": matrices},
            "ttt": {"chunks": 31, "steps": 120, "untrained_from_chunk": None, "weight_change": 0.0176,
                    "parameters": 785_698}},
    }  # fmt: skip
    return result | changes


def metrics(steps: int = STEPS) -> list[dict]:
    """A falling loss, two validations, a running score."""
    loss = lambda step: 3 + 4 * math.exp(-step / 20)
    scale = lambda step: min(1.0, 2 * (steps - step + 1) / steps)
    row = lambda event, step, **values: {"event": event, "step": step} | values
    train = [
        row("train", step, loss=loss(step), seconds=0.1 * step, lr_scale=scale(step))
        for step in range(1, steps + 1)
    ]
    between = [row("validation", step, loss=3.3, bpb=1.65, seconds=6.0) for step in (60, 120)]
    ttt = [row("ttt", i, bpb=1.55 - 0.001 * i, positions=8192 * (i + 1), seconds=i) for i in range(30)]
    return train + between + ttt


def write_run(folder: Path, rows=None, techniques=TECHNIQUES, **changes) -> shared.Run:
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(json.dumps(result_of(**changes)))
    if techniques:
        (folder / "techniques.json").write_text(json.dumps(techniques))
    lines = [json.dumps(row) for row in (metrics() if rows is None else rows)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return shared.Run.open(folder)


def text_of(html: str) -> str:
    """What a reader sees, without styles."""
    return " ".join(re.sub(r"<[^>]+>", " ", re.sub(r"<style.*?</style>", " ", html, flags=re.DOTALL)).split())


def without(result: dict, *path: str) -> dict:
    """A part of a result with one entry left out, as the change that write_run takes."""
    top = json.loads(json.dumps(result[path[0]]))
    inner = top
    for key in path[1:-1]:
        inner = inner[key]
    inner.pop(path[-1])
    return {path[0]: top}


@pytest.fixture(scope="module")
def full(tmp_path_factory) -> shared.Run:
    return write_run(tmp_path_factory.mktemp("report") / "full")


@pytest.fixture(scope="module")
def full_page(full) -> str:
    return report.page([full])


@pytest.fixture
def undrawn(monkeypatch):
    """Figures are made but not rendered, which takes most of a page's time."""
    monkeypatch.setattr(report, "as_svg", lambda figure, label: plt.close(figure) or "<svg></svg>")


def test_the_page_holds_every_part(full_page):
    text = text_of(full_page)
    for part in (
        "Score", "Training", "Bytes", "Quantisation error", "Clocks", "Proofs", "Settings", "Machine",
        "1.62310", "+0.0011", "-0.0935", "-0.0215", "3.0125 nats", "1,000,000 of 16,000,000 bytes, 6.2 %",
        "attention, codes within ±15 300,000 B", "code 100,000 B", "a code takes 4.21 bits on average",
        "attention 0.400 overall", "0.30", "0.50", "598.0 s of 600 s", "calibrate 8.0 s", "warm-up 3.0 s",
        "xsa +0.2500", "from step 150", "0.248 to 0.154", "3.86 %", "31 chunks", "MATRIX_LR 0.031",
        "1x A GPU", "c0ffee", "97.4", "QAT", "EMA",
    ):  # fmt: skip
        assert part in text, part
    assert "class='chip'" not in full_page  # a run alone needs no name at every table
    assert "over the limit" not in text and "exceeded" not in text


def test_the_page_needs_nothing_else(full_page):
    links = re.findall(r"(?:src|href)=['\"]([^'\"]+)", full_page)
    assert links and all(link.startswith(("#", "data:")) for link in links)
    assert "url(http" not in full_page and "@import" not in full_page and "<script" not in full_page
    ids = re.findall(r"\bid=\"([^\"]+)\"", full_page)
    drawn = "".join(re.findall(r"<svg.*?</svg>", full_page, re.DOTALL))
    for colour, variable in report.THEME.items():  # the page's own, so that they follow light and dark
        assert colour not in drawn and variable in drawn
    figures = full_page.count("<svg")
    # Loss by step and by time, each wide and narrow; test-time training; pace.
    assert figures == 6 and full_page.count('role="img"') == 6
    assert set(re.findall(r"(?:url\(|href=\")#([^)\"]+)", full_page)) <= set(ids)
    assert ids and len(ids) == len(set(ids))  # no figure is clipped by another's frame


@pytest.mark.parametrize(
    "changes, rows, gone",
    [
        (without(result_of(), "proofs", "qat"), None, "from step 150"),
        (without(result_of(), "proofs", "quantizer"), None, "Quantisation error"),
        ({"techniques": None}, None, "xsa +0.2500"),
        ({"techniques": TECHNIQUES | {"artifact_sha256": "another"}}, None, "xsa +0.2500"),
        (without(result_of(), "budget", "evaluation"), None, "540.0 s of 600 s"),
        ({}, [row for row in metrics() if row["event"] != "ttt"], "Score so far"),
        ({}, [row for row in metrics() if row["event"] != "validation"], "circles: validation"),
        ({}, [], "Training loss as measured"),
        ({"artifact": {}}, None, "bits on average"),
        ({"changed": {}}, None, "MATRIX_LR 0.031"),
    ],
)
def test_a_part_is_there_only_if_the_run_has_it(tmp_path, undrawn, full_page, changes, rows, gone):
    html = report.page([write_run(tmp_path / "part", rows, **changes)])
    assert gone in text_of(full_page) and gone not in text_of(html)


def test_a_score_alone_makes_a_page(tmp_path):
    """STAGES=evaluate of an artifact from elsewhere leaves no training, no proofs, no bytes."""
    few = ("preset", "seed", "corpus", "val_tokens", "val_bytes", "bpb", "val_loss")
    (tmp_path / "score").mkdir()
    result = {key: result_of()[key] for key in few}
    (tmp_path / "score/result.json").write_text(json.dumps(result))
    text = text_of(report.page([shared.Run.open(tmp_path / "score")]))
    assert "1.50920" in text and not any(part in text for part in ("Training", "Bytes", "Clocks", "Proofs"))


def test_breaches_stand_out(tmp_path, undrawn):
    result = result_of()
    over = result["artifact"] | {"total_bytes": 16_442_824}
    late = result["budget"] | {"training": result["budget"]["training"] | {"used": 600.4, "within": False}}
    html = report.page([write_run(tmp_path / "over", artifact=over, budget=late)])
    assert html.count("class='bad'>over the limit") == 2 and html.count("class='bad'>exceeded") == 2


def test_several_runs_are_overlaid_and_their_differences_listed(tmp_path, undrawn, full):
    changed = {"matrix_lr": 0.05, "muon_wd": 0.1}
    other = write_run(tmp_path / "other", changed=changed, bpb={"float": 1.5, "ttt": None})
    html = report.page([full, other])
    rows = {
        cells[0]: cells[1:]
        for row in re.findall(r"<tr>(.*?)</tr>", html)
        if (cells := [text_of(cell) for cell in re.findall(r"<t[hd].*?>(.*?)</t[hd]>", row)])
    }
    assert rows["MATRIX_LR"] == ["0.031", "0.05"] and rows["MUON_WD"] == ["0.04", "0.1"]
    assert rows["ttt the same, test-time training"][1] == "off"
    figure = report.draw_loss([full, other], report.WIDE)
    drawn = [line for line in figure.axes[0].lines if line.get_label() in ("full", "other")]
    assert [line.get_color() for line in drawn] == list(report.COLOURS[:2])
    plt.close(figure)


def test_the_difference_to_the_first_run_has_a_panel_of_its_own(tmp_path, full):
    """A run that is 0.01 nats worse from step 101 on, which the curves themselves hide."""
    train = [row for row in metrics() if row["event"] == "train"]
    worse = [row | {"loss": row["loss"] + 0.01 * (row["step"] > 100)} for row in train]
    figure = report.draw_loss([full, write_run(tmp_path / "worse", worse)], report.WIDE)
    curve = next(line for line in figure.axes[1].lines if len(line.get_ydata()) == STEPS)
    plt.close(figure)
    assert curve.get_color() == report.COLOURS[1] and np.allclose(curve.get_ydata()[:100], 0)
    assert curve.get_ydata()[-1] == pytest.approx(0.01, rel=0.02)


def test_settings_are_the_runs_own_not_this_checkouts(tmp_path):
    """result.json's settings count, whatever the presets are; those of scoring are of the last evaluation."""
    own = {"preset": "gone", "ve_layers": [1, 2], "ttt_lr": 0.1, "ema_decay": 0.98}
    again = {"settings": own | {"ttt_lr": 0.7, "ema_decay": 0.5}, "preset": "gone", "changed": {}}
    run = write_run(tmp_path / "run", preset="gone", changed={}, settings=own, scored_with=again)
    assert run.settings == {"preset": "gone", "ve_layers": (1, 2), "ttt_lr": 0.7, "ema_decay": 0.98}


def test_short_names_tell_runs_apart():
    def short(*names):
        return report.short_names([shared.Run(Path("logs") / name, {}) for name in names])

    assert short("p-seed1-x", "p-seed20-x") == ["seed1", "seed20"]
    assert short("a", "b") == ["a", "b"] and short("only-one") == ["only-one"]
    assert short("a-1", "a-1-1") == ["a-1", "a-1-1"]  # a name without a part of its own
    assert short("p-seed1-20260101-120000", "p-seed2-20260102-130000") == ["seed1", "seed2"]
    assert short("p-20260101-120000", "p-20260102-120000") == ["20260101", "20260102"]


def test_names_and_corpora_are_escaped(tmp_path, full, request):
    odd = write_run(tmp_path / "a&b <i>$x$", corpus="<script>alert(1)</script>")
    drawn = report.as_svg(report.draw_loss([full, odd], report.NARROW), "loss")
    assert "a&b <i>$x$" in [text.text for text in ElementTree.fromstring(drawn).iter() if text.text]
    request.getfixturevalue("undrawn")
    html = report.page([odd])
    assert "<script" not in html and "&lt;script&gt;" in html and "a&amp;b &lt;i&gt;" in html


def test_every_name_of_a_file_is_escaped(tmp_path, undrawn):
    """Clocks, phases, sections, techniques, settings, what was exported, hardware."""
    bad, base = "<script>alert('1')</script>", result_of()
    clock = base["budget"]["training"] | {"counted": {bad: 1.0}, "uncounted": {bad: 1.0}}
    sizes = base["artifact"] | {"sections": {bad: {"bytes": 5}}, "sha256": bad}
    changes = {
        "budget": {bad: clock},
        "artifact": sizes,
        "hardware": bad,
        "preset": bad,
        "script_sha256": bad,
    }
    changes |= {"proofs": {"averaging": {"exported": bad, "distance_from_raw": 0.1}}}
    changes |= {"settings": {"a": bad, "b": [bad]}, "changed": {"a": bad}}
    found = {"artifact_sha256": bad, "techniques": {bad: {"loss": 1.0, "loss_without": 2.0}}}
    html = report.page([write_run(tmp_path / "run", techniques=found, **changes)])
    assert "<script" not in html and html.count("&lt;script&gt;alert(&#x27;1&#x27;)") >= 12


@pytest.mark.parametrize("name", ["_under", "a$b$", r"a\$b", "${x^2}$", "a\tb"])
def test_a_name_is_drawn_as_it_is(tmp_path, full, name):
    """No formula, and in the legend though it begins like one of matplotlib's own."""
    figure = report.draw_loss([full, write_run(tmp_path / name)], report.WIDE)
    drawn = report.as_svg(figure, "loss")
    texts = [text.text for text in ElementTree.fromstring(drawn).iter() if text.text]
    assert name.replace("\t", "\ufffd") in texts


def marks(runs, key="step"):
    """The labelled vertical lines of the main figure: label -> place."""
    figure = report.draw_loss(runs, report.WIDE, key)
    found = {(text.get_text(), round(text.xy[0], 3)) for text in figure.axes[0].texts}
    plt.close(figure)
    return found


def test_qat_and_averaging_are_marked_on_the_axis(tmp_path, full):
    """EMA with decay 0.98 weighs over its last 50 steps; SWA starts below a learning-rate scale of 0.2."""
    assert marks([full]) == {("QAT", 150), ("EMA", 150.0)}
    assert marks([full], "seconds") == {("QAT", 15), ("EMA", 15)}
    averaging = {"exported": "swa", "distance_from_raw": 0.1}
    swa = write_run(tmp_path / "swa", proofs={"qat": None, "averaging": averaging})
    first = next(row["step"] for row in metrics() if row.get("lr_scale", 1) < 0.2)
    assert marks([swa]) == {("SWA", first)}
    assert marks([write_run(tmp_path / "raw", proofs={"qat": None})]) == set()


def test_seeds_share_a_label(tmp_path):
    """Marks that touch get one label, those far apart one each."""
    proofs = [{"qat": result_of()["proofs"]["qat"] | {"first_step": step}} for step in (100, 104, 190)]
    runs = [write_run(tmp_path / str(i), proofs=proof) for i, proof in enumerate(proofs)]
    assert marks(runs) == {("QAT", 100), ("QAT", 190)}


def test_units_of_the_loss(tmp_path, full):
    """Equal bytes per token: nats with a second scale; unequal: each run in its own bits per byte."""
    other = write_run(tmp_path / "other", val_bytes=2 * BYTES)
    unscored = write_run(tmp_path / "unscored", val_tokens=None, bpb={}, val_loss={})
    assert report.loss_unit([full, full]) == "nats+bpb" and report.loss_unit([full, unscored]) == "nats"
    assert report.loss_unit([full, other]) == "bpb"
    raw = [row["loss"] for row in metrics() if row["event"] == "train"]
    for runs, factors in (([full], [1.0]), ([full, other], [TOKENS / BYTES / math.log(2)] * 2)):
        figure = report.draw_loss(runs, report.WIDE)
        curves = [line.get_ydata() for line in figure.axes[0].lines if len(line.get_ydata()) == STEPS]
        plt.close(figure)
        assert np.allclose(curves[0], np.array(raw) * factors[0])
    assert np.allclose(curves[2], np.array(raw) * factors[0] / 2)  # twice the bytes, half the bits for each


def test_smoothing_and_thinning():
    assert report.smoothed([2.0] * 50) == [2.0] * 50
    noisy = [5.0 + (-1) ** i for i in range(1000)]
    assert max(abs(value - 5) for value in report.smoothed(noisy)[100:]) < 0.1
    falling = [10 * math.exp(-i / 20) for i in range(400)]
    trail = max(abs(a - b) for a, b in zip(report.smoothed(falling), falling))
    assert trail < 1.5  # even at the steep start
    assert report.thinned(0) == [] and report.thinned(1) == [0]
    assert report.thinned(10_001)[0] == 0 and report.thinned(10_001)[-1] == 10_000
    assert len(report.thinned(10_001)) <= report.POINTS + 1


def test_a_resumed_runs_steps_count_once(tmp_path):
    """Killed at step 30, resumed from 20, killed within a line; a second evaluation replaces the first."""
    rows, twice = metrics(40), [{"event": "ttt", "step": i, "bpb": 9.0, "positions": i} for i in range(3)]
    train = [row for row in rows if row["event"] == "train"]
    run = write_run(tmp_path / "run", [*train[:30], *train[20:], *rows[-30:], *twice])
    path = tmp_path / "run/metrics.jsonl"
    path.write_text(path.read_text() + '{"event": "train", "step": 41, "lo')
    assert [row["step"] for row in run.metrics("train")] == list(range(1, 41))
    assert [row["bpb"] for row in run.metrics("ttt")] == [9.0] * 3


def call(monkeypatch, capsys, *words):
    monkeypatch.setattr(sys, "argv", ["report.py", *map(str, words)])
    status = shared.exit_status(report.program)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.mark.whole
def test_files_of_the_command_line(tmp_path, monkeypatch, capsys, undrawn):
    a, b = (write_run(tmp_path / name).folder for name in "ab")
    status, out, err = call(monkeypatch, capsys, a, b)
    assert status == 0 and not err and str(a / "report.html") in out
    assert not list(b.glob("report*")) and not list(a.glob("*.tmp"))
    image = matplotlib.image.imread(a / "report.png")
    assert image.shape[1] > 1200 and image[..., :3].std() > 0.05
    status, out, _ = call(monkeypatch, capsys, a, "--out", tmp_path / "both.html")
    assert status == 0 and (tmp_path / "both.html").is_file() and (tmp_path / "both.png").is_file()


@pytest.mark.parametrize(
    "words, part",
    [
        (["nowhere"], "no result.json"),
        (["a", "a"], "named twice"),
        (["a", "--out", "a.pdf"], "name it .html"),
        (["a", "--out", "missing/a.html"], "missing"),
        (["b"], "techniques.json is damaged"),
    ],
)
def test_mistakes_are_one_line(tmp_path, monkeypatch, capsys, undrawn, words, part):
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", techniques={"artifact_sha256": "beef"})
    monkeypatch.chdir(tmp_path)
    status, out, err = call(monkeypatch, capsys, *words)
    assert status == 1 and not out and err.startswith("error:") and len(err.splitlines()) == 1 and part in err


def test_matplotlib_missing_is_one_line(tmp_path, monkeypatch, capsys):
    write_run(tmp_path / "a")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    status, _, err = call(monkeypatch, capsys, tmp_path / "a")
    assert status == 1 and err.startswith("error: matplotlib is missing; pip install")


@pytest.mark.whole
def test_report_of_a_real_run(tmp_path, tiny, undrawn):
    """What the script and the audit write is what the page reads: every part is there."""
    short = {"ITERATIONS": "12", "WARMDOWN_ITERS": "8", "WARMUP_STEPS": "0", "VAL_LOSS_EVERY": "11"}
    short |= {"EVAL_STRIDE": "128", "TTT_CHUNK_TOKENS": "4096"}
    assert run_here(tmp_path, tiny | short | {"RUN_ID": "real"}) == 0
    folder = tmp_path / "logs/real"
    assert audit.main([str(folder / "artifact.bin"), "--techniques"]) == 0
    run = shared.Run.open(folder)
    text = text_of(report.page([run]))
    for part in (
        "Score", "circles: validation", "dotted: QAT starts", "Score so far", "Time per step", "embeddings",
        "a code takes", "mlp.proj", "Clocks", "value residual", "QAT from step", "Averaging : ema",
        "Test-time training :", "MODEL_DIM 64", f"{run.bpb['ttt']:.5f}",
    ):  # fmt: skip
        assert part in text, part


def browse(folder: Path, html: str, *flags: str) -> tuple[str, Path, str]:
    """A page in headless Chromium: its document after loading, a screenshot, what the console said."""
    (folder / "page.html").write_text(html)
    command = [
        *(BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"),
        *("--hide-scrollbars", "--enable-logging=stderr", f"--user-data-dir={folder / 'profile'}", *flags),
        *("--dump-dom", f"--screenshot={folder / 'page.png'}", (folder / "page.html").as_uri()),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    return done.stdout, folder / "page.png", done.stderr


# Added to the page: what is drawn and how large, and whether anything is wider than the screen.
MEASURE = """<script>
const figures = [...document.querySelectorAll('figure svg')].filter(svg => svg.checkVisibility())
  .map(svg => svg.getBoundingClientRect()).filter(box => box.width > 200 && box.height > 150).length;
const wide = document.documentElement.scrollWidth - document.documentElement.clientWidth;
document.documentElement.setAttribute('data-measured', JSON.stringify({figures, wide}));
</script></body>"""


@pytest.mark.whole
@pytest.mark.browser
@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("size, dark", [("1100,3000", False), ("500,3000", True)])
def test_a_browser_shows_it(tmp_path, full_page, size, dark):
    """No console message, the figures are there in the run's colour, nothing is wider than the screen."""
    flags = [f"--window-size={size}", *(["--blink-settings=preferredColorScheme=0"] if dark else [])]
    dom, picture, console = browse(tmp_path, full_page.replace("</body>", MEASURE), *flags)
    assert "CONSOLE" not in console, console
    measured = json.loads(re.search(r'data-measured="([^"]+)"', dom)[1].replace("&quot;", '"'))
    assert measured == {"figures": 3, "wide": 0}  # the fourth is folded away
    image = matplotlib.image.imread(picture)[..., :3]
    assert (image[2, 2].mean() < 0.2) == dark
    colour = np.array([int(report.COLOURS[0][i : i + 2], 16) / 255 for i in (1, 3, 5)])
    assert (np.abs(image - colour).max(-1) < 0.05).sum() > 1000


@pytest.mark.whole
@pytest.mark.browser
@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
def test_the_browser_test_sees_console_messages(tmp_path):
    assert "CONSOLE" in browse(tmp_path, "<script>console.error('seen')</script>")[2]
