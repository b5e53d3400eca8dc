"""Draw the README's picture of the pipeline: what happens in which order, on which clock, under which cap.

    python records/pipeline.py                       -> records/pipeline.svg
    python records/pipeline.py --out pipeline.png    a bitmap of twice the size

The same call writes the same bytes. Lengths are pixels of a picture 800 wide, y grows downwards.
"""

from __future__ import annotations

import runs as shared

# isort: split
import io
import math
import sys
from collections.abc import Iterable
from pathlib import Path

from runs import Mistake, need

WIDTH, HEIGHT, DPI = 800, 500, 96
INK, MUTED, LINE = "#1a1d23", "#5b6370", "#8a929e"
TRAINING = ("#1f5fbf", "#eaf1fc", "#9fbfee")  # text, band, drawings in it
EVALUATION = ("#13745f", "#e6f5f1", "#8fd0c1")
FILE = ("#a8500c", "#fdf0e4", "#f0b27c")
DRAWING = {"svg.fonttype": "none", "svg.hashsalt": "pipeline", "font.family": "sans-serif"}
Rectangle = tuple[float, float, float, float]  # left, top, right, bottom
Colours = tuple[str, str, str]


class Picture:
    """Boxes, bands, arrows and small drawings on one set of axes."""

    def __init__(self):
        from matplotlib.figure import Figure

        self.figure = Figure(figsize=(WIDTH / DPI, HEIGHT / DPI), dpi=DPI)
        self.axes = self.figure.add_axes((0, 0, 1, 1), xlim=(0, WIDTH), ylim=(HEIGHT, 0), frameon=False)
        self.axes.set_axis_off()
        self.rounded((0, 0, WIDTH, HEIGHT), "white", "none", radius=8)

    def rounded(self, at: Rectangle, face: str, edge: str, radius: float = 7, **style) -> None:
        """A rectangle with round corners."""
        from matplotlib.patches import FancyBboxPatch

        left, top, right, bottom = at
        style |= {"boxstyle": f"round,pad=0,rounding_size={radius}", "fc": face, "ec": edge, "clip_on": False}
        self.axes.add_patch(FancyBboxPatch((left, top), right - left, bottom - top, **style))

    def text(self, x: float, y: float, what: str, size: float = 8.4, colour: str = MUTED, **style) -> None:
        """A text around (x, y)."""
        style = {"ha": "center", "va": "center", "linespacing": 1.3} | style
        self.axes.text(x, y, what, fontsize=size, color=colour, clip_on=False, **style)

    def band(self, at: Rectangle, colours: Colours, title: str, about: str, indent: float = 14) -> None:
        """What one clock covers."""
        left, top, right, _ = at
        self.rounded(at, colours[1], "none", radius=10)
        self.text(left + indent, top + 22, title, 10, colours[0], ha="left", va="baseline", weight="bold")
        self.text(right - 14, top + 22, about, ha="right", va="baseline")

    def box(self, at: Rectangle, title: str, about: str, colour: str) -> None:
        """A stage: its name, a line or two below it, room for a drawing."""
        left, top, right, _ = at
        self.rounded(at, "white", colour, lw=1.1)
        self.text((left + right) / 2, top + 20, title, 10, INK, va="baseline", weight="bold")
        for i, line in enumerate(about.splitlines()):
            self.text((left + right) / 2, top + 39 + 14 * i, line, va="baseline")

    def shards(self, at: Rectangle, colours: Colours, title: str) -> None:
        """A cylinder, as text on a disk is drawn."""
        from matplotlib.patches import Ellipse, PathPatch
        from matplotlib.path import Path as Outline

        left, top, right, bottom = at
        width, tall = right - left, 14
        side = {"fc": colours[1], "ec": colours[2], "lw": 1.1, "clip_on": False}
        arc = [(left + width * (1 - math.cos(t)) / 2, bottom + tall / 2 * math.sin(t)) for t in _angles()]
        self.axes.add_patch(PathPatch(Outline([(left, top), *arc, (right, top)]), **side))
        self.axes.add_patch(Ellipse(((left + right) / 2, top), width, tall, **side))
        self.text((left + right) / 2, (top + bottom) / 2 + 6, title, colour=colours[0])

    def arrow(self, *points: tuple[float, float], colour: str = LINE, width: float = 1.3) -> None:
        """A line through the points with a head at the last."""
        xs, ys = zip(*points)
        self.axes.plot(xs, ys, color=colour, lw=width, solid_joinstyle="round", clip_on=False)
        (x0, y0), (x, y) = points[-2:]
        length = math.hypot(x - x0, y - y0)
        dx, dy = (x - x0) / length * 7, (y - y0) / length * 7
        head = [(x, y), (x - dx - dy / 2, y - dy + dx / 2), (x - dx + dy / 2, y - dy - dx / 2)]
        self.axes.fill(*zip(*head), color=colour, lw=0, clip_on=False)

    def bars(self, bars: Iterable[Rectangle], colour: str) -> None:
        """Rectangles of one colour, as one path."""
        from matplotlib.patches import PathPatch
        from matplotlib.path import Path as Outline

        codes = [Outline.MOVETO, *[Outline.LINETO] * 3, Outline.CLOSEPOLY]
        corners = [[(a, b), (c, b), (c, d), (a, d), (a, b)] for a, b, c, d in bars]
        path = Outline(sum(corners, []), codes * len(corners))
        self.axes.add_patch(PathPatch(path, fc=colour, ec="none", clip_on=False))

    def bytes_of(self, suffix: str) -> bytes:
        """The picture as a file of a format that matplotlib writes."""
        buffer = io.BytesIO()
        metadata = {"Date": None, "Creator": None, "Title": "The pipeline"} if suffix == "svg" else None
        self.figure.savefig(buffer, format=suffix, dpi=2 * DPI, transparent=True, metadata=metadata)
        return buffer.getvalue()


def _angles(steps: int = 12) -> list[float]:
    """From 0 to pi."""
    return [math.pi * step / steps for step in range(steps + 1)]


def training(picture: Picture) -> None:
    """The upper band: shards, training, Hessians, GPTQ, packing."""
    colour, _, light = TRAINING
    picture.band((104, 14, 788, 198), TRAINING, "Training clock: 600 s", "all that touches training text")
    picture.arrow((84, 112), (118, 112))
    picture.arrow((49, 143), (49, 182), (413, 182), (413, 164))
    picture.shards((14, 84, 84, 136), TRAINING, "training\nshards")
    for left, right in ((336, 356), (470, 490), (640, 660)):
        picture.arrow((left, 106), (right, 106))

    picture.box((118, 46, 336, 164), "train", "Muon, AdamW, averaged weights", light)
    start, fall, late, end, top, floor = 134, 197, 258, 320, 96, 148  # learning rate, QAT in its lower half
    picture.bars([(late, top, end, floor)], "#d6e4fa")
    picture.axes.plot([start, fall, end], [top, top, floor], color=colour, lw=1.8, clip_on=False)
    picture.axes.plot([start, end], [floor, floor], color=light, lw=1, clip_on=False)
    picture.text(start, floor - 8, "learning rate", ha="left")
    picture.text(end - 4, top + 9, "late QAT", ha="right", colour=colour)

    picture.box((356, 46, 470, 164), "Hessians", "what each matrix\nis fed with", light)
    cells, step = 6, 8
    for shade, (low, high) in {colour: (0, 0), light: (1, 1), "#d6e4fa": (2, cells)}.items():
        spots = ((i, j) for i in range(cells) for j in range(cells) if low <= abs(i - j) <= high)
        corner = [(389 + step * i, 107 + step * j) for i, j in spots]
        picture.bars([(x, y, x + step - 1.5, y + step - 1.5) for x, y in corner], shade)

    picture.box((490, 46, 640, 164), "GPTQ", "int5 and int6, in steps\nthat fit the cap", light)
    heights = [44 * math.exp(-0.5 * (code / 5.2) ** 2) for code in range(-15, 16)]
    picture.bars([(503 + 4 * i, 154 - max(h, 1), 506 + 4 * i, 154) for i, h in enumerate(heights)], colour)

    picture.box((660, 46, 774, 164), "pack", "codes without\ntheir redundancy", light)
    for i, (full, kept) in enumerate(((82, 44), (64, 34), (74, 40))):
        y = 110 + 15 * i
        picture.bars([(676, y, 676 + full, y + 10)], "#d6e4fa")
        picture.bars([(676, y, 676 + kept, y + 10)], colour)


def between(picture: Picture) -> None:
    """The middle row, read from right to left: the file, and nothing else."""
    colour, face, light = FILE
    picture.arrow((717, 164), (717, 218), colour=light, width=1.8)
    picture.rounded((540, 218, 788, 284), face, light, lw=1.1)
    picture.text(554, 238, "artifact.bin", 10, colour, ha="left", va="baseline", weight="bold")
    picture.bars([(554, 247, 774, 257)], "white")
    picture.bars([(554, 247, 752, 257)], light)
    picture.axes.plot([774, 774], [243, 261], color=colour, lw=1.8, clip_on=False)
    picture.text(774, 275, "with the script at most 16,000,000 bytes", 8.2, ha="right", va="baseline")
    picture.arrow((540, 251), (494, 251), colour=light, width=1.8)
    picture.rounded((234, 224, 494, 278), "white", LINE, lw=1.1, ls=(0, (4, 3)))
    picture.text(364, 245, "forget", 10, INK, va="baseline", weight="bold")
    picture.text(364, 264, "model, optimiser and training text are gone", 8.2, va="baseline")
    picture.arrow((234, 251), (172, 251), (172, 336), colour=light, width=1.8)


def evaluation(picture: Picture) -> None:
    """The lower band: loading, then three scores of the same text."""
    colour, _, light = EVALUATION
    picture.band(
        (104, 302, 788, 488),
        EVALUATION,
        "Evaluation clock: 600 s",
        "each position is scored once, before it is learnt",
        142,
    )
    rail = 472
    picture.axes.plot([49, 49, 677], [431, rail, rail], color=LINE, lw=1.3, clip_on=False)
    for x in (314, 481, 677):
        picture.arrow((x, rail), (x, 454))
    picture.shards((14, 372, 84, 424), EVALUATION, "validation\nshards")

    picture.box((118, 336, 226, 454), "load", "the model from\nthe file alone", light)
    picture.bars([(133, 404, 155, 432)], FILE[2])
    picture.arrow((159, 418), (181, 418))
    picture.bars([(186, 402 + 7 * i, 212, 406.5 + 7 * i) for i in range(5)], colour)
    for left, right in ((226, 246), (382, 402), (560, 580)):
        picture.arrow((left, 396), (right, 396))

    picture.box((246, 336, 382, 454), "roundtrip", "windows side by side", light)
    picture.bars([(262 + 27 * i, 412, 286 + 27 * i, 422) for i in range(4)], colour)

    picture.box((402, 336, 560, 454), "sliding", "more context per token", light)
    for i in range(4):
        left, y = 420 + 18 * i, 390 + 14 * i
        picture.bars([(left, y, left + 66, y + 9)], light)
        picture.bars([(left + 48 * (i > 0), y, left + 66, y + 9)], colour)

    picture.box((580, 336, 774, 454), "test-time training", "score a chunk, then train on it", light)
    chunks = [(645 + 24 * i, 398) for i in range(5)]
    picture.bars([(x - 9, y - 6, x + 9, y + 6) for x, y in chunks], colour)
    picture.bars([(x - 9, y + 22, x + 9, y + 34) for x, y in chunks[:-1]], FILE[2])
    for (x, y), (after, _) in zip(chunks, chunks[1:]):
        picture.arrow((x, y + 7), (x, y + 21), width=1.0)
        picture.arrow((x + 5, y + 21), (after - 5, y + 8), width=1.0)
    picture.text(629, 398, "score", ha="right", colour=colour)
    picture.text(629, 426, "train", ha="right", colour=FILE[0])


def draw(suffix: str) -> bytes:
    """The whole picture as the bytes of an svg or png file."""
    import matplotlib

    with matplotlib.rc_context(DRAWING):
        picture = Picture()
        for part in (training, evaluation, between):
            part(picture)
        return picture.bytes_of(suffix)


def program() -> None:
    """The command line."""
    parser = shared.parser(__doc__)
    place, about = Path(__file__).with_suffix(".svg"), "an .svg or .png file (default: beside this program)"
    parser.add_argument("--out", type=Path, default=place, help=about)
    out = parser.parse_args().out
    if out.suffix not in (".svg", ".png"):
        raise Mistake(f"{out} must end in .svg or .png")
    need("matplotlib")
    shared.write_atomically(out, draw(out.suffix[1:]))
    print(f"picture: {out}")


if __name__ == "__main__":
    sys.exit(shared.exit_status(program))
