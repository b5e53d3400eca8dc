"""Write what happened in one or several runs as one HTML file, and its main figure as a PNG.

    python records/report.py logs/RUN                       -> logs/RUN/report.html, logs/RUN/report.png
    python records/report.py logs/A logs/B --out ab.html    several runs overlaid

The file needs nothing else: it opens offline, on a phone as on a large screen, in light and dark, and prints.
"""

from __future__ import annotations

import argparse
import io
import math
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from html import escape
from itertools import pairwise
from os.path import commonprefix
from pathlib import Path

import runs as shared
from runs import SCORES, Mistake, Run, differing_settings, need, open_runs, show

# Colours of runs, chosen to differ for the colour-blind and to stand out on white and on near-black.
COLOURS = ("#3b7ddd", "#e07b28", "#1f9e89", "#c2569b", "#8a7bd8", "#a68a1d", "#5d8aa8", "#d1545b")
# What a figure is drawn in and the page replaces by its own colours: one drawing serves light and dark.
INK, MUTED, GRID = "#1a1d23", "#68707c", "#dfe3e8"
THEME = {INK: "var(--ink)", MUTED: "var(--muted)", GRID: "var(--grid)"}
POINTS = 500  # of a curve; more do not show
WIDE, NARROW = (9.4, 4.7), (4.3, 4.4)  # inches; the page shows one or the other


# Numbers


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


def second_of(run: Run, step: float) -> float:
    """Training seconds at a step."""
    rows = run.metrics("train")
    return min(rows, key=lambda row: abs(row["step"] - step))["seconds"] if rows else step


def qat_start(run: Run) -> int | None:
    """The first step with fake quantisation."""
    return (run.result["proofs"].get("qat") or {}).get("first_step")


def averaging_start(run: Run) -> tuple[str, float] | None:
    """The exported average and the step where it begins: EMA's time constant, SWA's first snapshot."""
    kind, rows = run.result["proofs"].get("averaging", {}).get("exported"), run.metrics("train")
    if not rows:
        return None
    if kind == "ema":
        return "EMA", max(1.0, rows[-1]["step"] - 1 / max(1e-9, 1 - run.settings["ema_decay"]))
    below = [row["step"] for row in rows if row["lr_scale"] < run.settings["swa_threshold"]]
    return ("SWA", below[0]) if kind == "swa" and below else None


# Runs on the page


def cycle_colours(runs: Sequence[Run]) -> list[str]:
    """A colour for each run."""
    return [COLOURS[i % len(COLOURS)] for i in range(len(runs))]


def short_names(runs: Sequence[Run]) -> list[str]:
    """The parts of the runs' names that tell them apart: a-seed1-x, a-seed2-x -> seed1, seed2."""
    names = [run.name.split("-") for run in runs]
    first = len(commonprefix(names))
    last = len(commonprefix([name[first:][::-1] for name in names]))
    short = ["-".join(name[first : len(name) - last]) for name in names]
    return short if len(runs) > 1 and all(short) else [run.name for run in runs]


# Figures: drawn with matplotlib, shown as inline SVG


def new_figure(size: tuple[float, float], rows: Sequence[float] = (1,)):
    """A figure with panels one below the other that share their horizontal axis."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    plt.rcParams.update(
        {
            "svg.fonttype": "none",
            "font.size": 9.5,
            "axes.edgecolor": GRID,
            "axes.labelcolor": MUTED,
            "text.color": INK,
            "xtick.color": MUTED,
            "ytick.color": MUTED,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "grid.color": GRID,
            "grid.linewidth": 0.7,
            "axes.grid": True,
            "axes.axisbelow": True,
            "xtick.major.size": 0,
            "ytick.major.size": 0,
        }
    )
    figure, axes = plt.subplots(
        len(rows),
        sharex=True,
        figsize=size,
        squeeze=False,
        layout="constrained",
        gridspec_kw={"height_ratios": rows},
    )
    return figure, [row[0] for row in axes]


def as_svg(figure, label: str) -> str:
    """A figure as an SVG element in the page's colours."""
    from matplotlib import pyplot as plt

    buffer = io.StringIO()
    plt.rcParams["svg.hashsalt"] = label  # ids repeat from call to call, and differ between figures
    figure.savefig(
        buffer,
        format="svg",
        transparent=True,
        metadata={"Date": None, "Creator": None, "Format": None, "Type": None},
    )
    plt.close(figure)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    head, body = text.split(">", 1)
    box = head.split('viewBox="')[1].split('"')[0]
    body = re.sub(r' id="[\w.]+_\d+"', "", body)  # names that nothing refers to and every figure repeats
    for colour, variable in THEME.items():
        body = body.replace(colour, variable)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="{box}" '
        f'role="img" aria-label="{escape(label)}">{body}'
    )


def draw_loss(runs: Sequence[Run], size: tuple[float, float], key: str = "step"):
    """Loss and bits per byte, below them the learning rate; QAT and averaging marked on the axis."""
    figure, (top, bottom) = new_figure(size, (4, 1))
    unit, highest, lowest = loss_unit(runs), 0.0, math.inf
    for run, name, colour in zip(runs, short_names(runs), cycle_colours(runs)):
        rows = run.metrics("train")
        if not rows:
            continue
        factor = 1 / math.log(2) / run.bytes_per_token if unit == "bpb" else 1.0
        x, raw = [row[key] for row in rows], [row["loss"] * factor for row in rows]
        smooth, keep = smoothed(raw), thinned(len(rows))
        top.plot([x[i] for i in keep], [raw[i] for i in keep], color=colour, alpha=0.22, linewidth=0.7)
        top.plot(
            [x[i] for i in keep],
            [smooth[i] for i in keep],
            color=colour,
            linewidth=1.8,
            label=name.replace("$", r"\$"),
        )
        points = [(row[key], row["loss"] * factor) for row in run.metrics("validation")]
        if points:
            top.plot(*zip(*points), color=colour, marker="o", markersize=4.5, linestyle="--", linewidth=1)
        finals = [x[-1], run.nats["float"] * factor] if "float" in run.nats else []
        if finals:
            top.plot(
                *finals, color=colour, marker="D", markersize=6, markeredgecolor=INK, clip_on=False, zorder=5
            )
        bottom.plot([x[i] for i in keep], [rows[i]["lr_scale"] for i in keep], color=colour, linewidth=1.5)
        highest = max(highest, smooth[min(len(smooth) // 30, len(smooth) - 1)])
        lowest = min(lowest, *smooth, *(y for _, y in points), *finals[1:])
    mark_phases(runs, key, (top, bottom))
    if lowest < highest:
        top.set_ylim(lowest - 0.06 * (highest - lowest), highest + 0.1 * (highest - lowest))
    bottom.set_ylim(-0.06, 1.12)
    bottom.set_yticks([0, 1])
    top.set_ylabel("bits per byte" if unit == "bpb" else "loss, nats per token")
    bottom.set_ylabel("rate")
    bottom.set_xlabel("step" if key == "step" else "training time, seconds")
    bottom.margins(x=0.01)
    if unit == "nats+bpb":
        factor = 1 / math.log(2) / runs[0].bytes_per_token
        right = top.secondary_yaxis("right", functions=(lambda y: y * factor, lambda y: y / factor))
        right.set_ylabel("bits per byte")
        right.spines["right"].set_visible(False)
    if len(runs) > 1:
        columns = min(len(runs), 4 if size == WIDE else 2)
        figure.legend(
            *top.get_legend_handles_labels(), frameon=False, loc="outside upper left", ncols=columns
        )
    return figure


def mark_phases(runs: Sequence[Run], key: str, panels) -> None:
    """Vertical lines where QAT starts and the exported average begins; neighbours share a label."""
    marks: dict[str, dict[float, list[str]]] = {}
    for run, colour in zip(runs, cycle_colours(runs)):
        for label, step in (("QAT", qat_start(run)), averaging_start(run) or ("", None)):
            if step is not None:
                at = step if key == "step" else round(second_of(run, step))
                marks.setdefault(label, {}).setdefault(at, []).append(colour)
    ends = [run.metrics("train")[-1][key] for run in runs if run.metrics("train")]
    apart = 0.1 * max(ends, default=0.0)
    for label, places in marks.items():
        style, height = (":", -2) if label == "QAT" else ((0, (1, 4)), -14)
        for at, colours in places.items():
            near = [other for other in places if abs(other - at) < apart]
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
    ends = []
    for run, name, colour in zip(runs, short_names(runs), cycle_colours(runs)):
        rows = run.metrics("ttt")
        if not rows:
            continue
        axis.plot(
            [row["positions"] / 1e6 for row in rows],
            [row["bpb"] for row in rows],
            color=colour,
            linewidth=1.8,
            label=name.replace("$", r"\$"),
        )
        settled = [row["bpb"] for row in rows[len(rows) // 10 :]]
        ends += [min(settled), max(settled)]
        if "sliding" in run.bpb:
            axis.axhline(run.bpb["sliding"], color=colour, linestyle=":", linewidth=1.2)
            ends.append(run.bpb["sliding"])
        stop = run.result["proofs"].get("ttt", {}).get("untrained_from_chunk")
        if stop is not None and stop < len(rows):
            axis.axvline(rows[stop]["positions"] / 1e6, color=colour, linestyle="--", linewidth=1)
    if ends and max(ends) > min(ends):
        margin = 0.15 * (max(ends) - min(ends))
        axis.set_ylim(min(ends) - margin, max(ends) + margin)
    axis.set_xlabel("scored positions, millions")
    axis.set_ylabel("bits per byte so far")
    return figure


def draw_pace(runs: Sequence[Run], size: tuple[float, float]):
    """Milliseconds per step: what QAT costs, and what else slows a run down."""
    figure, (axis,) = new_figure(size)
    top = 0.0
    for run, colour in zip(runs, cycle_colours(runs)):
        rows = run.metrics("train")
        pace = [1000 * (b["seconds"] - a["seconds"]) / (b["step"] - a["step"]) for a, b in pairwise(rows)]
        if not pace:
            continue
        keep, smooth = thinned(len(pace)), smoothed(pace, 0.02)
        axis.plot([rows[i + 1]["step"] for i in keep], [smooth[i] for i in keep], color=colour, linewidth=1.5)
        top = max(top, 1.6 * sorted(pace)[len(pace) // 2], 1.1 * max(smooth[len(smooth) // 20 :]))
        if qat_start(run):
            axis.axvline(qat_start(run), color=colour, linestyle=":", linewidth=1.2)
    axis.set_ylim(0, top or 1)
    axis.set_xlabel("step")
    axis.set_ylabel("ms per step")
    return figure


# The page, piece by piece


def table(head: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "") -> str:
    """An HTML table of cells that are HTML already; the first cell of a row is its header."""
    cells = "".join(
        f"<tr><th scope='row'>{row[0]}</th>{''.join(f'<td>{cell}</td>' for cell in row[1:])}</tr>"
        for row in rows
    )
    top = "".join(f"<th scope='col'>{cell}</th>" for cell in head)
    return (
        f"<div class='scroll'><table class='{kind}'><thead><tr>{top}</tr></thead>"
        f"<tbody>{cells}</tbody></table></div>"
    )


def chip(run: Run, runs: Sequence[Run]) -> str:
    """A run's short name with its colour."""
    place = list(runs).index(run)
    name, colour = short_names(runs)[place], cycle_colours(runs)[place]
    return f"<span class='chip' style='--c:{colour}'>{escape(name)}</span>"


def section(title: str, body: str, note: str = "") -> str:
    """A titled part of the page; nothing where there is nothing to say."""
    note = f"<p class='note'>{note}</p>" if note else ""
    return f"<section><h2>{title}</h2>{note}{body}</section>" if body else ""


def picture(
    draw: Callable,
    runs: Sequence[Run],
    label: str,
    caption: str,
    sizes: Sequence[tuple] = (WIDE, NARROW),
    **options,
) -> str:
    """A figure drawn once for wide and once for narrow screens, or once for both."""
    kinds = ("wide", "narrow") if len(sizes) > 1 else ("",)
    drawn = "".join(
        f"<div class='{kind}'>{as_svg(draw(runs, size, **options), f'{label} {kind}'.strip())}</div>"
        for kind, size in zip(kinds, sizes)
    )
    return f"<figure>{drawn}<figcaption>{caption}</figcaption></figure>"


def headline(run: Run, runs: Sequence[Run]) -> str:
    """One card: the score, the bytes and both clocks of a run at a glance."""
    result = run.result
    last = list(run.bpb)[-1] if run.bpb else None
    tiles = [(f"{run.bpb[last]:.4f}", f"bits per byte, {last}")] if last else []
    if artifact := result.get("artifact"):
        over = "" if artifact["total_bytes"] <= artifact["limit"] else ": <b class='bad'>over the limit</b>"
        tiles.append((f"{artifact['total_bytes']:,}", f"bytes of {artifact['limit']:,}{over}"))
    for clock, budget in result["budget"].items():
        verdict = "" if budget["within"] else " <b class='bad'>exceeded</b>"
        tiles.append((f"{budget['used']:.0f} s", f"{clock}{verdict}"))
    if "params" in result:
        tiles += [(f"{result['params'] / 1e6:.2f} M", "parameters"), (f"{result.get('steps', 0):,}", "steps")]
    cells = "".join(f"<div><strong>{value}</strong><span>{what}</span></div>" for value, what in tiles)
    line = f"{escape(result['preset'])}, seed {run.seed}, {escape(str(result['corpus']))}"
    full = "" if chip(run, runs).endswith(f">{escape(run.name)}</span>") else f"{escape(run.name)}<br>"
    body = f"<h3>{chip(run, runs)}</h3><p>{full}{line}</p><div class='tiles'>{cells}</div>"
    return f"<article class='card'>{body}</article>"


def score_ladder(runs: Sequence[Run]) -> str:
    """Scores by stage; each with its step from the one before."""
    rows = []
    for name, meaning in SCORES.items():
        cells = []
        for run in runs:
            names = list(run.bpb)
            if name not in names:
                cells.append("<span class='off'>off</span>")
                continue
            before = names[names.index(name) - 1] if names.index(name) else None
            change = run.bpb[name] - run.bpb[before] if before else 0.0
            tone = "good" if change < 0 else "worse"
            step = f" <small class='{tone}'>{change:+.4f}</small>" if before else ""
            nats = f"<br><small>{run.nats[name]:.4f} nats</small>" if name in run.nats else ""
            cells.append(f"{run.bpb[name]:.5f}{step}{nats}")
        rows.append([f"{name}<br><small>{meaning}</small>", *cells])
    kind = "several" if len(runs) > 1 else ""
    return table(["bits per byte", *(chip(run, runs) for run in runs)], rows, kind)


ROLE_NAMES = {
    "attn": "attention",
    "mlp": "MLP",
    "embed": "embeddings",
    "raw": "controls",
    "scales": "scales",
    "header": "header",
    "code": "code",
}


def section_name(key: str) -> str:
    """attn.15 -> attention, codes within ±15."""
    role, _, detail = key.partition(".")
    what = f", codes within ±{detail}" if detail.isdigit() else f", {detail}" if detail else ""
    return ROLE_NAMES.get(role, role) + what


def stacked(parts: Sequence[tuple[str, float]], whole: float, unit: str, limit: float = 0) -> str:
    """A bar of parts, each as wide as its share of `whole`, a line at the limit, and a legend."""
    number = lambda value: f"{value:,.0f}" if unit == "B" else f"{value:.1f}"
    bars = "".join(
        f"<i style='width:{100 * size / whole:.3f}%' class='p{i % 8}' title='{escape(name)} {number(size)} "
        f"{unit}'></i>"
        for i, (name, size) in enumerate(parts)
    )
    mark = f"<u style='left:{100 * limit / whole:.3f}%'></u>" if limit else ""
    legend = "".join(
        f"<li class='p{i % 8}'>{escape(name)} <b>{number(size)} {unit}</b></li>"
        for i, (name, size) in enumerate(parts)
    )
    return f"<div class='bar'>{bars}{mark}</div><ul class='legend'>{legend}</ul>"


def artifact_bytes(run: Run, runs: Sequence[Run]) -> str:
    """What the artifact's bytes are spent on, against the limit."""
    artifact = run.result.get("artifact")
    if not artifact:
        return ""
    parts = [(section_name(key), part["bytes"]) for key, part in artifact.get("sections", {}).items()]
    parts = sorted([*parts, ("code", artifact["code_bytes"])], key=lambda part: -part[1])
    total, limit = artifact["total_bytes"], artifact["limit"]
    used = f"{total:,} of {limit:,} bytes, {100 * total / limit:.1f} %"
    used += "" if total <= limit else " <b class='bad'>over the limit</b>"
    coded = sum(part["bytes"] for part in artifact.get("sections", {}).values() if "entropy_bytes" in part)
    ideal = sum(part.get("entropy_bytes", 0) for part in artifact.get("sections", {}).values())
    entropy = f"; the codes take {coded / ideal:.3f} of their order-0 entropy" if ideal else ""
    whole = max(total, limit)
    gauge = f"<div class='bar thin'><i class='p0' style='width:{100 * total / whole:.2f}%'></i></div>"
    return f"<h3>{chip(run, runs)} <small>{used}{entropy}</small></h3>{gauge}{stacked(parts, total, 'B')}"


def error_map(run: Run, runs: Sequence[Run]) -> str:
    """GPTQ's error as a share of plain rounding's, layer by layer and matrix by matrix."""
    matrices = run.result["proofs"].get("quantizer", {}).get("matrices", {})
    grid: dict[str, dict[str, tuple[float, float]]] = {}
    for name, (plain, error) in matrices.items():
        block, kind = name.removesuffix(".weight").split(".", 2)[1:]
        grid.setdefault(block, {})[kind] = (plain, error)
    kinds = [
        kind
        for kind in ("attn.c_q", "attn.c_k", "attn.c_v", "attn.proj", "mlp.fc", "mlp.proj")
        if any(kind in row for row in grid.values())
    ]
    rows = [
        [block, *(error_cell(*row[kind]) if kind in row else "" for kind in kinds)]
        for block, row in sorted(grid.items(), key=lambda item: int(item[0]))
    ]
    if not rows:
        return ""
    quantizer, summary = run.result["proofs"]["quantizer"], []
    for role in ("attn", "mlp"):
        if (part := quantizer.get(role, {})).get("error_rounding"):
            summary.append(
                f"{ROLE_NAMES[role]} {part['error'] / part['error_rounding']:.3f} overall, "
                f"{part['floored_rows']} rows on the scale floor"
            )
    return f"<h3>{chip(run, runs)} <small>{'; '.join(summary)}</small></h3>" + table(
        ["layer", *kinds], rows, "heat"
    )


def error_cell(plain: float, error: float) -> str:
    """A ratio with its shade: full where all of rounding's error remains."""
    ratio = error / plain if plain else 0.0
    return (
        f"<span class='cell' style='--s:{100 * min(ratio, 1):.0f}%' title='{error:.4g} against {plain:.4g}'>"
        f"{ratio:.2f}</span>"
    )


def clock_bars(run: Run, runs: Sequence[Run]) -> str:
    """Both clocks of a run, phase by phase, against their limits."""
    bars = []
    for clock, budget in run.result["budget"].items():
        limit, used = budget["limit"], budget["used"]
        parts = sorted(budget["counted"].items(), key=lambda part: -part[1])
        verdict = "" if budget["within"] else " <b class='bad'>exceeded</b>"
        text = f"{used:.1f} s of {limit:.0f} s" if limit else f"{used:.1f} s, no limit set"
        free = ", ".join(f"{escape(name)} {seconds:.1f} s" for name, seconds in budget["uncounted"].items())
        bars.append(
            f"<h4>{escape(clock)} <small>{text}{verdict}</small></h4>"
            + stacked(parts, max(limit, used, 1e-9), "s", limit if used > limit else 0)
            + (f"<p class='note'>not counted: {free}</p>" if free else "")
        )
    both = "".join(f"<div>{bar}</div>" for bar in bars)
    return f"<h3>{chip(run, runs)}</h3><div class='columns'>{both}</div>" if bars else ""


def technique_table(runs: Sequence[Run]) -> str:
    """What the loss of one training batch would be without each technique."""
    proofs = [run.result["proofs"].get("techniques", {}) for run in runs]
    rows = []
    for name in dict.fromkeys(name for proof in proofs for name in proof):
        cells = [
            f"{proof[name]['loss_without'] - proof[name]['loss']:+.4f}"
            if name in proof
            else "<span class='off'>off</span>"
            for proof in proofs
        ]
        rows.append([name.replace("_", " "), *cells])
    return table(["without it, nats", *(chip(run, runs) for run in runs)], rows) if rows else ""


def proof_lines(run: Run, runs: Sequence[Run]) -> str:
    """QAT, averaging and test-time training in a sentence each."""
    proofs, lines = run.result["proofs"], []
    if qat := proofs.get("qat"):
        after = qat.get("distance_raw", qat.get("distance_averaged"))
        lines.append(
            f"<b>QAT</b> from step {qat['first_step']:.0f}: the weights' distance to their grid went from "
            f"{qat['distance_before']:.3f} to {after:.3f} of a step; rounding the exported weights changes "
            f"the loss of one batch by {qat['loss_rounded'] - qat['loss']:+.4f} nats."
        )
    elif "qat" in proofs:
        lines.append("<b>QAT</b> was off.")
    if averaging := proofs.get("averaging"):
        lines.append(
            f"<b>Averaging</b>: {escape(str(averaging.get('exported')))} was exported, "
            f"{100 * averaging['distance_from_raw']:.2f} % away from the raw weights."
        )
    if ttt := proofs.get("ttt"):
        stop = ttt.get("untrained_from_chunk")
        lines.append(
            f"<b>Test-time training</b>: {ttt['chunks']} chunks, {ttt['steps']} steps on "
            f"{ttt['parameters']:,} parameters, which moved by {100 * ttt['weight_change']:.2f} %; "
            + ("trained to the end." if stop is None else f"no training from chunk {stop} on.")
        )
    items = "".join(f"<li>{line}</li>" for line in lines)
    return f"<h3>{chip(run, runs)}</h3><ul class='proofs'>{items}</ul>" if items else ""


def settings_tables(runs: Sequence[Run]) -> str:
    """What was changed, what differs between the runs, and behind a fold every setting."""
    heads, changed = [chip(run, runs) for run in runs], differing_settings(runs)
    for run in runs:
        changed.update(dict.fromkeys(run.changed))
    rows = lambda names: [
        [
            f"<code>{escape(name.upper())}</code>",
            *(f"<code>{escape(show(run.settings.get(name, '')))}</code>" for run in runs),
        ]
        for name in names
    ]
    every = table(["setting", *heads], rows(runs[0].settings))
    few = (
        table(["changed or different", *heads], rows(changed))
        if changed
        else "<p>Nothing but the preset.</p>"
    )
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
        "artifact, SHA-256": lambda r: r.get("artifact", {}).get("sha256", ""),
    }
    rows = [
        [name, *(f"<span class='long'>{escape(str(fact(run.result)))}</span>" for run in runs)]
        for name, fact in facts.items()
    ]
    return table(["", *(chip(run, runs) for run in runs)], rows, "text")


def loss_caption(runs: Sequence[Run]) -> str:
    """What the marks of the main figure mean."""
    parts = ["Training loss as measured (faint) and smoothed"]
    if any(run.metrics("validation") for run in runs):
        parts.append("circles: validation")
    if any("float" in run.nats for run in runs):
        parts.append("diamond: validation of the averaged weights, before quantisation")
    if any(qat_start(run) for run in runs):
        parts.append("dotted: QAT starts")
    kinds = {start[0] for run in runs if (start := averaging_start(run))}
    parts += (
        ["sparse dots: from here on the exported EMA weighs most (its time constant)"]
        if "EMA" in kinds
        else []
    )
    parts += ["sparse dots: SWA takes its first snapshot"] if "SWA" in kinds else []
    return "; ".join(parts) + ". Below: the learning rate's scale."


def figures(runs: Sequence[Run]) -> str:
    """The curves: loss over steps and over time, running score of test-time training, pace."""
    if not any(run.metrics("train") for run in runs):
        body = ""
    else:
        caption = loss_caption(runs)
        body = picture(draw_loss, runs, "loss by step", caption)
        by_time = picture(draw_loss, runs, "loss by time", caption, key="seconds")
        body += f"<details><summary>over training time</summary>{by_time}</details>"
    pair = ""
    if any(run.metrics("ttt") for run in runs):
        pair += picture(
            draw_ttt,
            runs,
            "running score of test-time training",
            "Score so far while test-time training scores each chunk and then trains on it. Dotted: the "
            "sliding score of the same model, untrained.",
            [(4.6, 3.2)],
        )
    if any(len(run.metrics("train")) > 1 for run in runs):
        pair += picture(draw_pace, runs, "time per step", "Time per step; dotted: QAT starts.", [(4.6, 3.2)])
    return body + (f"<div class='columns'>{pair}</div>" if pair else "")


def page(runs: Sequence[Run]) -> str:
    """The whole report."""
    each = lambda part: "".join(part(run, runs) for run in runs)
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    body = [
        f"<header><h1>{escape(title)}</h1></header><div class='cards'>{each(headline)}</div>",
        section(
            "Score",
            score_ladder(runs),
            "Lower is better; the last line is the score. The small number is the step from the line above.",
        ),
        section("Training", figures(runs)),
        section(
            "Bytes",
            each(artifact_bytes),
            "The thin bar is the share of the limit, the thick one what it holds.",
        ),
        section(
            "Quantisation error",
            each(error_map),
            "Error of each layer's output, as a share of plain rounding's: "
            "1 would be no better than rounding. Hold a cell for the numbers.",
        ),
        section("Clocks", each(clock_bars)),
        section(
            "Proofs",
            technique_table(runs) + each(proof_lines),
            "Each technique leaves a measured trace: how much "
            "worse the loss of one batch of training text is with it switched off.",
        ),
        section("Settings", settings_tables(runs)),
        section("Machine", machine_table(runs)),
    ]
    return (
        f"<!doctype html><html lang='en'><head><meta charset='utf-8'><title>{escape(title)}</title>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'><link rel='icon' href='data:,'>"
        f"<meta name='color-scheme' content='light dark'><style>{CSS}</style></head>"
        f"<body><main>{''.join(body)}</main></body></html>\n"
    )


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
h1 { font-size:1.6rem; letter-spacing:-.01em; overflow-wrap:anywhere; }
h2 { font-size:1.12rem; margin-bottom:8px; }
h3 { font-size:1rem; margin:14px 0 6px; font-weight:600; }
h4 { font-size:.95rem; margin:8px 0 4px; font-weight:600; }
small, .note, figcaption { color:var(--muted); font-size:.86rem; font-weight:400; }
.note { margin-bottom:8px; max-width:92ch; }
section, .card { background:var(--card); border:1px solid var(--grid); border-radius:12px; padding:18px;
  margin-top:16px; }
.cards { display:grid; gap:16px; grid-template-columns:repeat(auto-fit, minmax(300px, 1fr)); }
.cards { margin-top:16px; } .cards .card { margin-top:0; }
.card h3 { margin:0; } .card p { color:var(--muted); font-size:.9rem; }
.tiles { display:grid; grid-template-columns:repeat(auto-fit, minmax(118px, 1fr)); gap:12px 18px;
  margin-top:12px; }
.tiles strong { display:block; font-size:1.32rem; font-weight:650; font-variant-numeric:tabular-nums; }
.tiles span { color:var(--muted); font-size:.82rem; line-height:1.3; display:block; }
.chip { overflow-wrap:break-word; } td small { white-space:nowrap; }
.chip::before { content:''; display:inline-block; width:.7em; height:.7em; border-radius:50%;
  background:var(--c); margin-right:.45em; }
.scroll { overflow-x:auto; }
table { border-collapse:collapse; width:100%; font-variant-numeric:tabular-nums; font-size:.94rem; }
th, td { padding:6px 10px; border-bottom:1px solid var(--grid); text-align:right; vertical-align:top;
  font-weight:400; }
th:first-child { text-align:left; padding-left:0; } thead th { color:var(--muted); font-size:.86rem; }
tbody tr:last-child > * { border-bottom:0; }
table.text td, table.text thead th { text-align:left; } .long { overflow-wrap:anywhere; }
code { font:.86em ui-monospace, 'SF Mono', Menlo, 'DejaVu Sans Mono', monospace; overflow-wrap:anywhere; }
.off { color:var(--muted); } .good { color:var(--good); } .worse { color:var(--muted); }
.bad { color:var(--bad); font-weight:650; }
.heat td { padding:2px; border:0; } .heat th { border:0; } .heat thead th + th { text-align:center; }
.cell { display:block; text-align:center; border-radius:5px; padding:5px 2px;
  background:color-mix(in srgb, var(--heat) calc(var(--s) * .8), var(--card)); }
figure { margin:4px 0 10px; } figure svg { display:block; width:100%; height:auto; }
figure svg text { font-family:inherit !important; }
.narrow { display:none; }
.columns { display:grid; gap:8px 28px;
  grid-template-columns:repeat(auto-fit, minmax(min(100%, 380px), 1fr)); }
.columns > * { min-width:0; }
.bar { position:relative; display:flex; height:26px; border-radius:7px; overflow:hidden;
  background:var(--grid); }
.bar.thin { height:8px; margin-bottom:8px; } .bar i { height:100%; }
.bar u { position:absolute; top:0; bottom:0; width:3px; background:var(--bad); }
.legend { list-style:none; padding:0; margin:8px 0; display:flex; flex-wrap:wrap; gap:4px 18px;
  font-size:.88rem; }
.legend b { font-weight:600; font-variant-numeric:tabular-nums; white-space:nowrap; }
.legend li::before { content:''; display:inline-block; width:.75em; height:.75em; border-radius:3px;
  background:var(--p); margin-right:.4em; }
.bar i { background:var(--p); }
PARTS
.proofs { padding-left:20px; } .proofs li { margin:4px 0; max-width:92ch; }
details { margin-top:10px; } summary { cursor:pointer; color:var(--muted); font-size:.92rem; padding:4px 0; }
@media (max-width:640px) { main { padding:16px 10px 40px; } section, .card { padding:14px; }
  .wide, .several th small { display:none; } .narrow { display:block; } th, td { padding:6px; }
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
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", metavar="LOGS", help="folders of finished runs")
    parser.add_argument(
        "--out", type=Path, help="the file to write (default: report.html in the first run's folder)"
    )
    arguments = parser.parse_args()
    need("matplotlib")
    runs = open_runs(arguments.runs)
    path = arguments.out or runs[0].folder / "report.html"
    if path.suffix != ".html":
        raise Mistake(f"{path}: the report is an HTML file, name it .html")
    shared.write_atomically(path, page(runs).encode())
    shared.write_atomically(path.with_suffix(".png"), main_figure(runs))
    print(f"report: {path} and {path.with_suffix('.png').name}")


if __name__ == "__main__":
    sys.exit(shared.exit_status(program))
