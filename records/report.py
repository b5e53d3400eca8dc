"""Write what happened in one or several runs as one HTML file, and its main figure as a PNG.

    python records/report.py logs/RUN                       -> logs/RUN/report.html, logs/RUN/report.png
    python records/report.py logs/A logs/B --out ab.html    several runs overlaid

The file needs nothing else: it opens offline, on a phone as on a large screen, in light and dark, and prints.
"""
from __future__ import annotations

import runs as shared

# isort: split
import io
import math
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from html import escape
from itertools import cycle, pairwise
from os.path import commonprefix
from pathlib import Path

from runs import SCORES, Mistake, Run, differing_settings, need, open_runs, show

# Colours of runs, chosen to differ for the colour-blind and to stand out on white and on near-black.
COLOURS = ("#3b7ddd", "#e07b28", "#1f9e89", "#c2569b", "#8a7bd8", "#a68a1d", "#5d8aa8", "#d1545b")
# What a figure is drawn in and the page replaces by its own colours: one drawing serves light and dark.
INK, MUTED, GRID = "#1a1d23", "#68707c", "#dfe3e8"
THEME = {INK: "var(--ink)", MUTED: "var(--muted)", GRID: "var(--grid)"}
POINTS = 500  # of a curve; more do not show
WIDE, NARROW, SMALL = (9.4, 4.7), (4.3, 4.4), (4.6, 3.2)  # inches; of the first two the page shows one
DRAWING = {
    "svg.fonttype": "none", "font.size": 9.5, "text.color": INK, "axes.labelcolor": MUTED,
    "xtick.color": MUTED, "ytick.color": MUTED, "axes.edgecolor": GRID, "axes.spines.top": False,
    "axes.spines.right": False, "grid.color": GRID, "grid.linewidth": 0.7, "axes.grid": True,
    "axes.axisbelow": True, "xtick.major.size": 0, "ytick.major.size": 0}


# Numbers and names


def smoothed(values: Sequence[float], share: float = 0.03) -> list[float]:
    """Moving average over a share of the curve, over less near its start, where the curve is steep."""
    out: list[float] = []
    for i, value in enumerate(values):
        weight = 1 / max(1.0, min(share * len(values), i / 6))
        out.append(value if not out else out[-1] + weight * (value - out[-1]))
    return out


def thinned(count: int) -> list[int]:
    """At most POINTS indices from the first to the last."""
    stride = max(1, math.ceil(count / POINTS))
    return [*range(0, count - 1, stride), count - 1] if count else []


def loss_unit(runs: Sequence[Run]) -> str:
    """nats+bpb where a token stands for as many bytes in all runs, else bpb; nats where that is unknown."""
    ratios = [run.bytes_per_token for run in runs]
    if None in ratios:
        return "nats"
    return "nats+bpb" if max(ratios) - min(ratios) < 1e-3 else "bpb"


def qat_start(run: Run) -> int | None:
    """The first step with fake quantisation."""
    return (run.result["proofs"].get("qat") or {}).get("first_step")


def averaging_start(run: Run) -> tuple[str, float] | None:
    """The exported average and the step where it begins: EMA's time constant, SWA's first snapshot."""
    kind, rows = (run.result["proofs"].get("averaging") or {}).get("exported"), run.metrics("train")
    if kind == "ema" and rows and "ema_decay" in run.settings:
        return "EMA", max(1.0, rows[-1]["step"] - 1 / max(1e-9, 1 - run.settings["ema_decay"]))
    below = [row["step"] for row in rows if row["lr_scale"] < run.settings.get("swa_threshold", 0.0)]
    return ("SWA", below[0]) if kind == "swa" and below else None


def short_names(runs: Sequence[Run]) -> list[str]:
    """The parts of the runs' names that tell them apart: a-seed1-x, a-seed2-x -> seed1, seed2.

    A time at the end, which run.sh appends, is left out where the rest differs.
    """
    names = [re.sub(r"-\d{8}-\d{6}$", "", run.name).split("-") for run in runs]
    if len({*map(tuple, names)}) < len(runs):
        names = [run.name.split("-") for run in runs]
    first = len(commonprefix(names))
    last = len(commonprefix([name[first:][::-1] for name in names]))
    short = ["-".join(name[first : len(name) - last]) for name in names]
    return short if len(runs) > 1 and all(short) else [run.name for run in runs]


def chips(runs: Sequence[Run]) -> list[str]:
    """Each run's short name with its colour; a run alone needs neither."""
    if len(runs) == 1:
        return [""]
    named = zip(short_names(runs), cycle(COLOURS))
    return [f"<span class='chip' style='--c:{colour}'>{escape(name)}</span>" for name, colour in named]


# Figures: drawn with matplotlib, shown as inline SVG


def new_figure(size: tuple[float, float], heights: Sequence[float] = (1,)):
    """A figure with panels one below the other that share their horizontal axis."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    plt.rcParams.update(DRAWING)
    figure, axes = plt.subplots(
        len(heights), sharex=True, figsize=size, squeeze=False, layout="constrained", height_ratios=heights)
    return figure, [row[0] for row in axes]


def as_svg(figure, label: str) -> str:
    """A figure as an SVG element in the page's colours."""
    from matplotlib import pyplot as plt

    buffer = io.StringIO()
    plt.rcParams["svg.hashsalt"] = label  # ids repeat from call to call, and differ between figures
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    plt.close(figure)
    head, body = buffer.getvalue().split("<svg", 1)[1].split(">", 1)
    box = re.search(r'viewBox="([^"]+)"', head)[1]
    body = re.sub(r' id="[\w.]+_\d+"', "", body)  # names that nothing refers to and every figure repeats
    for colour, variable in THEME.items():
        body = body.replace(colour, variable)
    spaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f'<svg {spaces} viewBox="{box}" role="img" aria-label="{escape(label)}">{body}'


def draw_loss(runs: Sequence[Run], size: tuple[float, float], key: str = "step"):
    """Loss and bits per byte, below them the learning rate; QAT and averaging marked on the axis.

    Of several runs also the smoothed loss less the first run's, which their common fall hides.
    """
    compared = key == "step" and len(runs) > 1 and all(run.metrics("train") for run in runs)
    figure, panels = new_figure(size, (4, 1.5, 1) if compared else (4, 1))
    top, bottom, unit, highest, lowest = panels[0], panels[-1], loss_unit(runs), 0.0, math.inf
    named: dict[str, list] = {"handles": [], "labels": []}
    for run, name, colour in zip(runs, short_names(runs), cycle(COLOURS)):
        rows = run.metrics("train")
        if not rows:
            continue
        factor = 1 / math.log(2) / run.bytes_per_token if unit == "bpb" else 1.0
        keep, raw = thinned(len(rows)), [row["loss"] * factor for row in rows]
        smooth, x = smoothed(raw), [rows[i][key] for i in keep]
        name = name if size == WIDE or len(name) < 20 else f"{name[:18]}…"
        top.plot(x, [raw[i] for i in keep], color=colour, alpha=0.22, linewidth=0.7)
        named["handles"] += top.plot(x, [smooth[i] for i in keep], color=colour, linewidth=1.8, label=name)
        named["labels"].append(name.replace("$", r"\$"))  # no formula
        points = [(row[key], row["loss"] * factor) for row in run.metrics("validation")]
        if points:
            top.plot(*zip(*points), color=colour, marker="o", markersize=4.5, linestyle="--", linewidth=1)
        final = [run.nats["float"] * factor] if "float" in run.nats else []
        if final:
            edge = {"markeredgecolor": INK, "clip_on": False, "zorder": 5}
            top.plot(x[-1], final[0], color=colour, marker="D", markersize=6, **edge)
        bottom.plot(x, [rows[i]["lr_scale"] for i in keep], color=colour, linewidth=1.5)
        highest = max(highest, smooth[min(len(smooth) // 30, len(smooth) - 1)])
        lowest = min(lowest, *smooth, *(y for _, y in points), *final)
    if compared:
        draw_difference(runs, panels[1], unit)
    mark_phases(runs, key, panels)
    if lowest < highest:
        top.set_ylim(lowest - 0.06 * (highest - lowest), highest + 0.1 * (highest - lowest))
    bottom.set(ylim=(-0.06, 1.12), yticks=[0, 1], ylabel="rate")
    bottom.set_xlabel("step" if key == "step" else "training time, seconds")
    bottom.margins(x=0.01)
    top.set_ylabel("bits per byte" if unit == "bpb" else "loss, nats per token")
    if unit == "nats+bpb":
        factor = 1 / math.log(2) / runs[0].bytes_per_token
        right = top.secondary_yaxis("right", functions=(lambda y: y * factor, lambda y: y / factor))
        right.set_ylabel("bits per byte")
        right.spines["right"].set_visible(False)
    if len(runs) > 1:
        columns = min(len(runs), 4 if size == WIDE else 2)
        figure.legend(**named, frameon=False, loc="outside upper left", ncols=columns)
    return figure


def draw_difference(runs: Sequence[Run], panel, unit: str) -> None:
    """Smoothed training loss of each run less the first run's, at equal steps."""
    scale = [1 / math.log(2) / run.bytes_per_token if unit == "bpb" else 1.0 for run in runs]
    first, settled = {row["step"]: row["loss"] * scale[0] for row in runs[0].metrics("train")}, [0.0]
    panel.axhline(0, color=COLOURS[0], linewidth=1.2)
    for run, factor, colour in list(zip(runs, scale, cycle(COLOURS)))[1:]:
        rows = [row for row in run.metrics("train") if row["step"] in first]
        gap = smoothed([row["loss"] * factor - first[row["step"]] for row in rows], 0.05)
        keep = thinned(len(gap))
        panel.plot([rows[i]["step"] for i in keep], [gap[i] for i in keep], color=colour, linewidth=1.5)
        settled += gap[len(gap) // 5 :]
    margin = 0.15 * (max(settled) - min(settled)) or 0.01
    panel.set(ylim=(min(settled) - margin, max(settled) + margin), ylabel="difference")


def mark_phases(runs: Sequence[Run], key: str, panels) -> None:
    """Vertical lines where QAT starts and the exported average begins; neighbours share a label."""
    marks: dict[str, dict[float, list[str]]] = {}
    ends = [0.0]
    for run, colour in zip(runs, cycle(COLOURS)):
        rows = run.metrics("train")
        ends += [row[key] for row in rows[-1:]]
        for label, step in (("QAT", qat_start(run)), averaging_start(run) or ("", None)):
            if step is not None:
                nearest = min(rows, key=lambda row: abs(row["step"] - step), default={"seconds": step})
                at = step if key == "step" else round(nearest["seconds"])
                marks.setdefault(label, {}).setdefault(at, []).append(colour)
    for label, places in marks.items():
        style, height = (":", -2) if label == "QAT" else ((0, (1, 4)), -14)
        for at, colours in places.items():
            near = [other for other in places if abs(other - at) < 0.1 * max(ends)]
            colour = colours[0] if len(colours) == 1 else MUTED
            for panel in panels:
                panel.axvline(at, color=colour, linestyle=style, linewidth=1.2)
            if at == min(near):
                text = {"ha": "right", "va": "top", "color": colour if len(near) == 1 else MUTED}
                place = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points"}
                panels[0].annotate(label, (at, 1), xytext=(-3, height), **text, **place)


def draw_ttt(runs: Sequence[Run], size: tuple[float, float]):
    """Running bits per byte of test-time training, with the sliding score of the same model as a level."""
    figure, (axis,) = new_figure(size)
    curves = [(run, colour, run.metrics("ttt")) for run, colour in zip(runs, cycle(COLOURS))]
    most = max(row["positions"] for _, _, rows in curves for row in rows)
    unit, name = (1e6, "millions") if most >= 2e6 else (1e3, "thousands")
    ends = []
    for run, colour, rows in curves:
        if not rows:
            continue
        bpb = [row["bpb"] for row in rows]
        axis.plot([row["positions"] / unit for row in rows], bpb, color=colour, linewidth=1.8)
        settled = bpb[len(bpb) // 10 :]
        ends += [min(settled), max(settled)]
        if "sliding" in run.bpb:
            axis.axhline(run.bpb["sliding"], color=colour, linestyle=":", linewidth=1.2)
            ends.append(run.bpb["sliding"])
        stop = (run.result["proofs"].get("ttt") or {}).get("untrained_from_chunk")
        if stop is not None and stop < len(rows):
            axis.axvline(rows[stop]["positions"] / unit, color=colour, linestyle="--", linewidth=1)
    if max(ends) > min(ends):
        margin = 0.15 * (max(ends) - min(ends))
        axis.set_ylim(min(ends) - margin, max(ends) + margin)
    axis.set(xlabel=f"scored positions, {name}", ylabel="bits per byte so far")
    return figure


def draw_pace(runs: Sequence[Run], size: tuple[float, float]):
    """Milliseconds per step: what QAT costs, and what else slows a run down."""
    figure, (axis,) = new_figure(size)
    top = 0.0
    for run, colour in zip(runs, cycle(COLOURS)):
        rows = run.metrics("train")
        pace = [1000 * (b["seconds"] - a["seconds"]) / (b["step"] - a["step"]) for a, b in pairwise(rows)]
        if not pace:
            continue
        keep, smooth = thinned(len(pace)), smoothed(pace, 0.02)
        axis.plot([rows[i + 1]["step"] for i in keep], [smooth[i] for i in keep], color=colour, linewidth=1.5)
        top = max(top, 1.6 * sorted(pace)[len(pace) // 2], 1.1 * max(smooth[len(smooth) // 20 :]))
        if qat_start(run):
            axis.axvline(qat_start(run), color=colour, linestyle=":", linewidth=1.2)
    axis.set(ylim=(0, top or 1), xlabel="step", ylabel="ms per step")
    return figure


# The page, piece by piece; a piece is HTML, and empty where there is nothing to say


OFF = "<span class='off'>off</span>"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "") -> str:
    """An HTML table of cells that are HTML already; the first cell of a row is its header."""
    top = "".join(f"<th scope='col'>{cell}</th>" for cell in head)
    top = f"<thead><tr>{top}</tr></thead>" if any(head) else ""
    body = ""
    for name, *cells in rows:
        body += f"<tr><th scope='row'>{name}</th>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"
    return f"<div class='scroll'><table class='{kind}'>{top}<tbody>{body}</tbody></table></div>"


def section(title: str, body: str, note: str = "") -> str:
    """A titled part of the page."""
    note = f"<p class='note'>{note}</p>" if note else ""
    return f"<section><h2>{title}</h2>{note}{body}</section>" if body else ""


def each(part: Callable[[Run], str], runs: Sequence[Run]) -> str:
    """A piece for each run, under its name."""
    pieces = [(chip, part(run)) for chip, run in zip(chips(runs), runs)]
    return "".join((f"<h3>{chip}</h3>" if chip else "") + piece for chip, piece in pieces if piece)


def picture(draw: Callable, runs: Sequence[Run], label: str, caption: str, **options) -> str:
    """A figure drawn once for wide and once for narrow screens, or once for both."""
    kinds = {"wide": WIDE, "narrow": NARROW} if draw is draw_loss else {"": SMALL}
    drawn = "".join(
        f"<div class='{kind}'>{as_svg(draw(runs, size, **options), f'{label} {kind}'.strip())}</div>"
        for kind, size in kinds.items())
    return f"<figure>{drawn}<figcaption>{caption}</figcaption></figure>"


def verdict(kept: bool, breach: str) -> str:
    """A breach of a limit in words that stand out."""
    return "" if kept else f" <b class='bad'>{breach}</b>"


def headline(run: Run, chip: str) -> str:
    """One card: the score, the bytes and both clocks of a run at a glance."""
    result, last = run.result, list(run.bpb)[-1] if run.bpb else None
    tiles = [(f"{run.bpb[last]:.4f}", f"bits per byte, {last}")] if last else []
    if artifact := result["artifact"]:
        fits = verdict(artifact["total_bytes"] <= artifact["limit"], "over the limit")
        tiles.append((f"{artifact['total_bytes']:,}", f"bytes of {artifact['limit']:,}{fits}"))
    for clock, budget in result["budget"].items():
        tiles.append((f"{budget['used']:.0f} s", f"{escape(clock)}{verdict(budget['within'], 'exceeded')}"))
    if "params" in result:
        tiles += [(f"{result['params'] / 1e6:.2f} M", "parameters"), (f"{result.get('steps', 0):,}", "steps")]
    cells = "".join(f"<div><strong>{value}</strong><span>{what}</span></div>" for value, what in tiles)
    name = f"<h3>{chip}</h3>" if chip else ""
    name += f"{escape(run.name)}<br>" if chip and f">{escape(run.name)}<" not in chip else ""
    line = f"{escape(result['preset'])}, seed {run.seed}, {escape(str(result['corpus']))}"
    about = f"<div class='about'>{name}{line}</div>"
    return f"<article class='card'>{about}<div class='tiles'>{cells}</div></article>"


def score_ladder(runs: Sequence[Run]) -> str:
    """Scores by stage; each with its step from the one before."""

    def cell(run: Run, name: str) -> str:
        names = list(run.bpb)
        if name not in names:
            return OFF
        step = ""
        if place := names.index(name):
            change = run.bpb[name] - run.bpb[names[place - 1]]
            step = f" <small class='{'good' if change < 0 else 'off'}'>{change:+.4f}</small>"
        nats = f"<br><small>{run.nats[name]:.4f} nats</small>" if name in run.nats else ""
        return f"{run.bpb[name]:.5f}{step}{nats}"

    taken = [name for name in SCORES if any(name in run.bpb for run in runs)]
    rows = [[f"{n}<br><small>{SCORES[n]}</small>", *(cell(run, n) for run in runs)] for n in taken]
    return table(["bits per byte", *chips(runs)], rows, "several" * (len(runs) > 1)) if taken else ""


ROLE_NAMES = {"attn": "attention", "embed": "embeddings", "mlp": "MLP", "raw": "controls"}


def section_name(key: str) -> str:
    """attn.15 -> attention, codes within ±15."""
    role, _, detail = key.partition(".")
    what = f", codes within ±{detail}" if detail.isdigit() else f", {detail}" if detail else ""
    return ROLE_NAMES.get(role, role) + what


def stacked(parts: Sequence[tuple[str, float]], whole: float, number: str, limit: float = 0) -> str:
    """A bar of parts, each as wide as its share of `whole`, a line at the limit, and a legend."""
    bars, legend = [], []
    for i, (name, size) in enumerate(parts):
        text, kind = number.format(size), f"class='p{i % 8}'"
        bars.append(f"<i style='width:{100 * size / whole:.3f}%' {kind} title='{escape(name)} {text}'></i>")
        legend.append(f"<li {kind}>{escape(name)} <b>{text}</b></li>")
    mark = f"<u style='left:{100 * limit / whole:.3f}%'></u>" if limit else ""
    return f"<div class='bar'>{''.join(bars)}{mark}</div><ul class='legend'>{''.join(legend)}</ul>"


def artifact_bytes(run: Run) -> str:
    """What the artifact's bytes are spent on, against the limit."""
    artifact = run.result["artifact"]
    if not artifact:
        return ""
    sections, total, limit = artifact.get("sections", {}), artifact["total_bytes"], artifact["limit"]
    parts = [("code", artifact["code_bytes"])]
    parts += [(section_name(key), part["bytes"]) for key, part in sections.items()]
    coded = [part for key, part in sections.items() if key.partition(".")[2].isdigit()]
    codes = sum(part.get("plain_bytes", 0) for part in coded)  # each a byte before it is packed
    bits = 8 * sum(part["bytes"] for part in coded) / max(1, codes)
    used = f"{total:,} of {limit:,} bytes, {100 * total / limit:.1f} %"
    used += verdict(total <= limit, "over the limit")
    used += f"; a code takes {bits:.2f} bits on average" if coded else ""
    share = f"<div class='bar thin'><i class='p0' style='width:{100 * min(1, total / limit):.2f}%'></i></div>"
    bar = stacked(sorted(parts, key=lambda part: -part[1]), total, "{:,.0f} B")
    return f"<p class='note'>{used}</p>{share}{bar}"


def error_map(run: Run) -> str:
    """GPTQ's error as a share of plain rounding's, layer by layer and matrix by matrix."""
    quantizer, grid = run.result["proofs"].get("quantizer", {}), {}
    for name, errors in quantizer.get("matrices", {}).items():
        if place := re.fullmatch(r"blocks\.([0-9]{1,4})\.([\w.]+)\.weight", name):
            grid.setdefault(int(place[1]), {})[place[2]] = errors
    if not grid:
        return ""
    kinds = ["attn.c_q", "attn.c_k", "attn.c_v", "attn.proj", "mlp.fc", "mlp.proj"]
    kinds = [kind for kind in kinds if any(kind in row for row in grid.values())]
    cell = lambda plain, error: (
        f"<span class='cell' style='--s:{100 * min(error / (plain or 1), 1):.0f}%' "
        f"title='{error:.4g} against {plain:.4g}'>{error / (plain or 1):.2f}</span>")
    rows = [[str(n), *(cell(*row[k]) if k in row else "" for k in kinds)] for n, row in sorted(grid.items())]
    summary = []
    for role in ("attn", "mlp"):
        if (part := quantizer.get(role, {})).get("error_rounding"):
            floored = f"{part['floored_rows']} rows on the scale floor"
            share = part["error"] / part["error_rounding"]
            summary.append(f"{ROLE_NAMES[role]} {share:.3f} overall, {floored}")
    return f"<p class='note'>{'; '.join(summary)}</p>" + table(["layer", *kinds], rows, "heat")


def clock_bars(run: Run) -> str:
    """Both clocks of a run, phase by phase, against their limits."""
    bars = ""
    for clock, budget in run.result["budget"].items():
        limit, used = budget["limit"], budget["used"]
        text = f"{used:.1f} s of {limit:.0f} s" if limit else f"{used:.1f} s, no limit set"
        parts = sorted(budget["counted"].items(), key=lambda part: -part[1])
        free = ", ".join(f"{escape(name)} {seconds:.1f} s" for name, seconds in budget["uncounted"].items())
        bar = stacked(parts, max(limit, used, 1e-9), "{:.1f} s", limit if used > limit else 0)
        text += verdict(budget["within"], "exceeded")
        bars += f"<div><h4>{escape(clock)} <small>{text}</small></h4>{bar}"
        bars += f"<p class='note'>not counted: {free}</p></div>" if free else "</div>"
    return f"<div class='columns'>{bars}</div>" if bars else ""


def technique_table(runs: Sequence[Run]) -> str:
    """How much higher the loss of a batch of validation text is without each technique."""
    names = dict.fromkeys(name for run in runs for name in run.techniques)
    change = lambda effect: OFF if effect is None else f"{effect:+.4f}"
    rows = [[escape(n.replace("_", " ")), *(change(run.techniques.get(n)) for run in runs)] for n in names]
    return table(["without it, nats", *chips(runs)], rows) if rows else ""


def proof_lines(run: Run) -> str:
    """QAT, averaging and test-time training in a sentence each."""
    proofs, lines = run.result["proofs"], []
    if qat := proofs.get("qat"):
        lines.append(
            f"<b>QAT</b> from step {qat['first_step']:.0f}: the weights' distance to their grid went from "
            f"{qat['distance_before']:.3f} to {qat['distance_raw']:.3f} of a step; rounding the exported "
            f"weights changes the loss of one batch by {qat['loss_rounded'] - qat['loss']:+.4f} nats.")
    elif "qat" in proofs:
        lines.append("<b>QAT</b> was off.")
    if averaging := proofs.get("averaging"):
        lines.append(
            f"<b>Averaging</b>: {escape(str(averaging.get('exported')))} was exported, "
            f"{100 * averaging['distance_from_raw']:.2f} % away from the raw weights.")
    if ttt := proofs.get("ttt"):
        stop = ttt.get("untrained_from_chunk")
        lines.append(
            f"<b>Test-time training</b>: {ttt['chunks']} chunks, {ttt['steps']} steps on "
            f"{ttt['parameters']:,} parameters, which moved by {100 * ttt['weight_change']:.2f} %; "
            + ("trained to the end." if stop is None else f"no training from chunk {stop} on."))
    if found := proofs.get("documents"):
        gains = ", ".join(
            f"{escape(length)}: {row['ttt'] - row['roundtrip']:+.4f} in {row['documents']}"
            for length, row in run.result.get("by_length", {}).items())
        lines.append(
            f"<b>Documents</b>: {found['steps']} steps over {found['documents']} documents, "
            f"{found['untrained_documents']} of them without training; bits per byte against roundtrip by "
            f"length in tokens: {gains}.")
    return f"<ul class='proofs'>{''.join(f'<li>{line}</li>' for line in lines)}</ul>" if lines else ""


def settings_tables(runs: Sequence[Run]) -> str:
    """What was changed, what differs between the runs, and behind a fold every setting."""
    changed = differing_settings(runs) | {name: None for run in runs for name in run.changed}
    code = lambda text: f"<code>{escape(text)}</code>"
    value = lambda run, name: code(show(run.settings.get(name, "")))
    rows = lambda names: [[code(name.upper()), *(value(run, name) for run in runs)] for name in names]
    every = table(["setting", *chips(runs)], rows(runs[0].settings), "text")
    few = table(["changed or different", *chips(runs)], rows(changed), "text")
    few = few if changed else "<p>Nothing but the preset.</p>"
    return f"{few}<details><summary>every setting</summary>{every}</details>"


def machine_table(runs: Sequence[Run]) -> str:
    """Where a run was made, and by which script."""
    facts = {
        "hardware": lambda r: r.get("hardware", ""),
        "processes": lambda r: r.get("world_size", 1),
        "ms per step": lambda r: f"{r['step_ms']:.1f}" if "step_ms" in r else "",
        "training tokens": lambda r: f"{r['tokens_seen']:,}" if "tokens_seen" in r else "",
        "peak memory": lambda r: f"{r['peak_memory'] / 2**20:,.0f} MiB" if "peak_memory" in r else "",
        "compiled": lambda r: "yes" if r.get("compiled") else "no",
        "script, SHA-256": lambda r: r.get("script_sha256", ""),
        "artifact, SHA-256": lambda r: r["artifact"].get("sha256", "")}
    cell = lambda fact, run: f"<span class='long'>{escape(str(fact(run.result)))}</span>"
    return table(["", *chips(runs)], [[n, *(cell(f, run) for run in runs)] for n, f in facts.items()], "text")


def loss_caption(runs: Sequence[Run], key: str) -> str:
    """What the marks of the main figure mean."""
    kinds = {start[0] for run in runs if (start := averaging_start(run))}
    scored = any("float" in run.bpb for run in runs)
    parts = {
        "Training loss as measured (faint) and smoothed": True,
        "circles: validation": any(run.metrics("validation") for run in runs),
        "diamond: validation of the averaged weights, before quantisation": scored,
        "dotted: QAT starts": any(qat_start(run) for run in runs),
        "sparse dots: from here on the exported EMA weighs most (its time constant)": "EMA" in kinds,
        "sparse dots: SWA takes its first snapshot": "SWA" in kinds}
    less = f"the smoothed loss less that of <b>{escape(short_names(runs)[0])}</b>, then "
    below = (less if len(runs) > 1 and key == "step" else "") + "the learning rate's scale"
    return f"{'; '.join(text for text, there in parts.items() if there)}. Below: {below}."


def figures(runs: Sequence[Run]) -> str:
    """The curves: loss over steps and over time, running score of test-time training, pace."""
    body = pair = ""
    if any(run.metrics("train") for run in runs):
        body = picture(draw_loss, runs, "loss by step", loss_caption(runs, "step"))
        by_time = picture(draw_loss, runs, "loss by time", loss_caption(runs, "seconds"), key="seconds")
        body += f"<details><summary>over training time</summary>{by_time}</details>"
    if any(run.metrics("ttt") for run in runs):
        caption = "Score so far while test-time training scores each chunk and then trains on it."
        if any("sliding" in run.bpb for run in runs):
            caption += " Dotted: the sliding score of the same model, untrained."
        pair += picture(draw_ttt, runs, "running score of test-time training", caption)
    if any(len(run.metrics("train")) > 1 for run in runs):
        pair += picture(draw_pace, runs, "time per step", "Time per step; dotted: QAT starts.")
    return body + (f"<div class='columns'>{pair}</div>" if pair else "")


def page(runs: Sequence[Run]) -> str:
    """The whole report."""
    title = escape(runs[0].name if len(runs) == 1 else f"{len(runs)} runs")
    cards = "".join(map(headline, runs, chips(runs)))
    body = [
        f"<header><h1>{title}</h1></header><div class='cards'>{cards}</div>",
        section("Score", score_ladder(runs),
                "Lower is better; the last line is the score. Small numbers: the step from the line above."),
        section("Training", figures(runs)),
        section("Bytes", each(artifact_bytes, runs),
                "The thin bar is the share of the limit, the thick one what it holds."),
        section("Quantisation error", each(error_map, runs),
                "Error of each layer's output, as a share of plain rounding's: "
                "1 would be no better than rounding. Hold a cell for the numbers."),
        section("Clocks", each(clock_bars, runs)),
        section("Proofs", technique_table(runs) + each(proof_lines, runs),
                "Each technique leaves a measured trace. " + (
                    "The table: how much worse the loss on a batch of validation text is without it."
                    if any(run.techniques for run in runs) else
                    "What those of the model are worth, <code>audit.py --techniques</code> tells.")),
        section("Settings", settings_tables(runs)),
        section("Machine", machine_table(runs)),
    ]
    return (
        f"<!doctype html><html lang='en'><head><meta charset='utf-8'><title>{title}</title>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'><link rel='icon' href='data:,'>"
        f"<meta name='color-scheme' content='light dark'><style>{CSS}</style></head>"
        f"<body class='{'one' if len(runs) == 1 else ''}'><main>{''.join(body)}</main></body></html>\n")


PALETTE = ("#3b7ddd", "#1f9e89", "#e0a030", "#c2569b", "#8a7bd8", "#d1694a", "#6f8fa8", "#98a34b")
CSS = """
:root { --ink:#1a1d23; --muted:#5f6773; --grid:#dfe3e8; --paper:#f6f7f9; --card:#fff;
  --good:#12795f; --bad:#c0303a; --heat:#3b7ddd; }
@media (prefers-color-scheme: dark) { :root { --ink:#e8eaee; --muted:#a0a8b4; --grid:#323842; --paper:#14171c;
  --card:#1d2128; --good:#4cc3a0; --bad:#ff7b80; --heat:#4d8df0; } }
* { box-sizing:border-box; margin:0; }
body { font:16px/1.5 system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif;
  color:var(--ink); background:var(--paper); }
main { max-width:1060px; margin:0 auto; padding:28px 16px 56px; }
h1 { font-size:1.6rem; line-height:1.25; letter-spacing:-.01em; overflow-wrap:anywhere; }
h2 { font-size:1.12rem; margin-bottom:8px; }
h3 { font-size:1rem; margin:14px 0 6px; font-weight:600; }
h4 { font-size:.95rem; margin:8px 0 4px; font-weight:600; }
small, .note, figcaption, .about { color:var(--muted); font-size:.88rem; font-weight:400; }
.note, figcaption { margin-bottom:8px; max-width:92ch; text-wrap:pretty; }
.about h3 { margin:0; color:var(--ink); }
section, .card { background:var(--card); border:1px solid var(--grid); border-radius:12px; padding:18px;
  margin-top:16px; }
.cards { display:grid; gap:16px; margin-top:16px;
  grid-template-columns:repeat(auto-fit, minmax(300px, 1fr)); }
.cards .card { margin-top:0; }
.tiles { display:grid; grid-template-columns:repeat(auto-fit, minmax(118px, 1fr)); gap:12px 18px;
  margin-top:12px; }
.tiles strong { display:block; font-size:1.32rem; font-weight:650; font-variant-numeric:tabular-nums; }
.tiles span { color:var(--muted); font-size:.82rem; line-height:1.3; display:block; }
.chip { overflow-wrap:break-word; } td small { white-space:nowrap; }
.chip::before { content:''; display:inline-block; width:.7em; height:.7em; border-radius:50%;
  background:var(--c); margin-right:.45em; }
.scroll { overflow-x:auto; }
table { border-collapse:collapse; width:100%; font-variant-numeric:tabular-nums; font-size:.94rem; }
.one table:not(.heat) { width:auto; min-width:min(100%, 36rem); }
.one table:not(.text) td { padding-right:0; }
th, td { padding:6px 10px; border-bottom:1px solid var(--grid); text-align:right; vertical-align:top;
  font-weight:400; }
th:first-child { text-align:left; padding-left:0; } thead th { color:var(--muted); font-size:.86rem; }
tbody tr:last-child > * { border-bottom:0; }
table.text td, table.text thead th { text-align:left; } .long { overflow-wrap:anywhere; }
code { font:.86em ui-monospace, 'SF Mono', Menlo, 'DejaVu Sans Mono', monospace; overflow-wrap:anywhere; }
.off { color:var(--muted); } .good { color:var(--good); } .bad { color:var(--bad); font-weight:650; }
.heat { table-layout:fixed; } .heat td { padding:2px; } .heat th, .heat td { border:0; }
.heat thead th + th { text-align:center; }
.cell { display:block; text-align:center; border-radius:5px; padding:5px 2px;
  background:color-mix(in srgb, var(--heat) calc(var(--s) * .8), var(--card)); }
figure { margin:4px 0 10px; } figure svg { display:block; width:100%; height:auto; }
figure svg text { font-family:inherit !important; }
.narrow { display:none; }
.columns { display:grid; gap:8px 28px;
  grid-template-columns:repeat(auto-fill, minmax(min(100%, 380px), 1fr)); }
.columns > * { min-width:0; }
.bar { position:relative; display:flex; height:26px; border-radius:7px; overflow:hidden;
  background:var(--grid); }
.bar.thin { height:8px; margin-bottom:8px; } .bar i { height:100%; background:var(--p); }
.bar u { position:absolute; top:0; bottom:0; width:3px; background:var(--bad); }
.legend { list-style:none; padding:0; margin:8px 0; display:flex; flex-wrap:wrap; gap:4px 18px;
  font-size:.88rem; }
.legend b { font-weight:600; font-variant-numeric:tabular-nums; white-space:nowrap; }
.legend li::before { content:''; display:inline-block; width:.75em; height:.75em; border-radius:3px;
  background:var(--p); margin-right:.4em; }
PARTS
.proofs { padding-left:20px; margin-top:8px; } .proofs li { margin:4px 0; max-width:92ch; }
details { margin-top:10px; } summary { cursor:pointer; color:var(--muted); font-size:.92rem; padding:4px 0; }
@media (max-width:640px) { main { padding:16px 10px 40px; } section, .card { padding:14px; }
  h1 { font-size:1.3rem; } .wide, .several th small { display:none; } .narrow { display:block; }
  th, td { padding:6px; } .heat th, .heat td { font-size:.74rem; padding:1px; }
  .heat th:first-child { width:2.6rem; padding:5px 0; }
  .several th, .several td { padding:6px 3px; font-size:.8rem; } .several small { font-size:.72rem; } }
@media print { :root { --ink:#000; --muted:#444; --grid:#ccc; --paper:#fff; --card:#fff;
  --good:#12795f; --bad:#c0303a; --heat:#7aa7ee; }
  html { font-size:10.5px; } body { font-size:1rem; } main { max-width:none; padding:0; }
  * { print-color-adjust:exact; -webkit-print-color-adjust:exact; }
  section, .card { border:0; border-top:1px solid #ccc; border-radius:0; padding:10px 0; }
  figure, tr, .card, .bar { break-inside:avoid; } h2, h3, h4 { break-after:avoid; }
  details:not([open]) { display:none; }
  .wide { display:block; } .narrow { display:none; } .columns { grid-template-columns:1fr 1fr; }
  .tiles { grid-template-columns:repeat(6, 1fr); } th, td { padding:3px 6px; } }
""".replace("PARTS", "\n".join(f".p{i} {{ --p:{colour}; }}" for i, colour in enumerate(PALETTE)))


def main_figure(runs: Sequence[Run]) -> bytes:
    """The main figure as a PNG."""
    figure, buffer = draw_loss(runs, WIDE), io.BytesIO()
    figure.savefig(buffer, format="png", dpi=160, facecolor="white")
    return buffer.getvalue()


def program() -> None:
    """The command line."""
    parser = shared.parser(__doc__)
    parser.add_argument("runs", nargs="+", metavar="LOGS", help="folders of finished runs")
    place = "the file to write (default: report.html in the first run's folder)"
    parser.add_argument("--out", type=Path, help=place)
    arguments = parser.parse_args()
    need("matplotlib")
    warnings.filterwarnings("ignore", "Glyph .* missing")  # a name's; a browser has more fonts
    runs = open_runs(arguments.runs)
    path = arguments.out or runs[0].folder / "report.html"
    if path.suffix != ".html":
        raise Mistake(f"{path}: the report is an HTML file, name it .html")
    shared.write_atomically(path, page(runs).encode())
    shared.write_atomically(path.with_suffix(".png"), main_figure(runs))
    print(f"report: {path} and {path.with_suffix('.png').name}")


if __name__ == "__main__":
    sys.exit(shared.exit_status(program))
