"""What the parts of STEP_RULE=water are worth on trained models, as a Markdown table.

    python records/steps.py logs/RUN [logs/RUN ...] --bits 3         the matrices alone, tables as trained
    python records/steps.py logs/RUN [logs/RUN ...] --bytes 1000000  the whole model in a file of that size

Each run is one of STAGES=train without QAT. It is quantised by the script's own functions, one of which a row
of the table replaces, at equal packed bytes, side information included, and scored with windows side by side.
The cost is the difference to the weights as trained, in bpb.
"""

from __future__ import annotations

import runs as shared

# isort: split
import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import fmean
from unittest import mock

from runs import Mistake, Run, exit_status, script
from tqdm import tqdm


@contextlib.contextmanager
def replaced(**functions: Callable) -> Iterator[None]:
    """Functions of the script, by name, replaced for a while."""
    with contextlib.ExitStack() as stack:
        for name, function in functions.items():
            stack.enter_context(mock.patch.object(script(), name, function))
        yield


def scales_instead(scales: Callable) -> contextlib.AbstractContextManager:
    """Other row scales for water."""
    return mock.patch.dict(script().STEP_RULES, water=scales)


def each_matrix_its_deviation():
    """SDClip's bits for every matrix, the columns as in water."""
    sigma = script().STEP_RULES["sigma"]
    return scales_instead(lambda weight, *grid:
                          sigma(weight.flatten(1), *grid)[:, None].expand(weight.shape[:-1]))


def gamma(power: float):
    """Columns by a power of U's diagonal."""
    usual = script().water_columns
    return replaced(water_columns=lambda weight, scales, max_code, diagonal: usual(
        weight, scales, max_code, diagonal ** power))


def bound(times: float):
    """Steps that hold so many times a column's largest weight, in place of 1.6 times."""
    usual = script().water_columns
    return replaced(water_columns=lambda weight, scales, max_code, diagonal: usual(
        weight * (times / 1.6), scales, max_code, diagonal))


def coarser_columns(eighths: int):
    """Exponents of columns in multiples of so many eighths of an octave."""
    usual = script().water_columns
    return replaced(water_columns=lambda *given: (usual(*given) / eighths).round() * eighths)


def damping(share: float):
    """Another damping, for steps and solver alike."""
    usual = script().inverse_cholesky
    return replaced(inverse_cholesky=lambda hessian, damp: usual(hessian, share))


def order(sign: float):
    """Columns by ascending diagonal (-1), or as they stand (0)."""
    def ordered(hessian, damp):
        diagonal = hessian.diagonal(dim1=-2, dim2=-1)
        by = (sign * diagonal).argsort(dim=-1, descending=True, stable=True)
        rows = hessian.take_along_dim(by.unsqueeze(-1), 1).take_along_dim(by.unsqueeze(1), 2)
        return by, script().inverse_cholesky(rows, damp), diagonal.take_along_dim(by, -1) <= 0

    return replaced(act_order=ordered)


VARIANTS = {  # row: the rule, and what is replaced
    "absmax": ("absmax", contextlib.nullcontext),
    "sigma (SDClip)": ("sigma", contextlib.nullcontext),
    "water": ("water", contextlib.nullcontext),
    "matrices by their deviation": ("water", each_matrix_its_deviation),
    "columns alike (gamma 0)": ("water", partial(gamma, 0.0)),
    "gamma 0.5": ("water", partial(gamma, 0.5)),
    "gamma 0.75": ("water", partial(gamma, 0.75)),
    "gamma 1.25": ("water", partial(gamma, 1.25)),
    "bound of 1": ("water", partial(bound, 1.0)),
    "bound of 2.5": ("water", partial(bound, 2.5)),
    "no bound, codes clipped": ("water", partial(bound, 0.001)),
    "columns in quarters of an octave": ("water", partial(coarser_columns, 2)),
    "columns in halves of an octave": ("water", partial(coarser_columns, 4)),
    "damping 0.003": ("water", partial(damping, 0.003)),
    "damping 0.03": ("water", partial(damping, 0.03)),
    "smallest inputs first": ("water", partial(order, -1.0)),
    "inputs as they stand": ("water", partial(order, 0.0)),
}


def share(f: float) -> Callable:
    """Rows of tables with f times the mean row's curvature added, in place of once."""
    return lambda rows: rows + (f - 1) / 2 * rows.mean()


FILES = {  # row: the rule, and what becomes of the curvature of tables' rows; None: it is not looked at
    "absmax": ("absmax", None),
    "sigma (SDClip)": ("sigma", None),
    "water, tables int8": ("water", None),
    "water, rows of a table alike": ("water", lambda rows: rows.mean().expand_as(rows)),
    "water": ("water", share(1.0)),
    "water, rarest rows coarser (0.3)": ("water", share(0.3)),
    "water, rarest rows finer (3)": ("water", share(3.0)),
}


class Trained:
    """A run's trained weights, and what quantising and scoring them needs."""

    def __init__(self, folder: Path):
        tg, run = script(), Run.open(folder)
        names = tg.Hyperparameters.fields()
        given = {name: tuple(value) if isinstance(value, list) else value
                 for name, value in run.result.get("settings", {}).items() if name in names}
        self.hp = dataclasses.replace(tg.Hyperparameters(), **given)
        if self.hp.late_qat_threshold or not (folder / "model.pt").is_file():
            raise Mistake(f"{folder} is no run of STAGES=train LATE_QAT_THRESHOLD=0 with its model.pt")
        self.world, self.seed = tg.World(self.hp, {}), run.seed
        tg.choose_dtype(self.hp, self.world, run.result.get("dtype"))
        self.weights = tg.torch.load(folder / "model.pt", map_location="cpu", weights_only=True)
        self.validation = tg.Validation.load(self.hp, self.world)
        stream = tg.TokenStream(tg.read_split(self.hp.data_path, "train"))
        sample = stream.sample(self.hp.gptq_calib_sequences, self.hp.train_seq_len, self.hp.seed)
        models = {rule: self.model(self.weights, step_rule=rule) for rule in ("absmax", "water")}
        self.hessians = {rule: tg.collect_hessians(models[rule], sample, self.world) for rule in models}
        self.float = self.score(self.weights)

    def model(self, weights: dict, **changes):
        """A model of these weights."""
        tg = script()
        model = tg.GPT(dataclasses.replace(self.hp, **changes)).to(self.world.device).use(tg.sdpa_attention)
        model.load_state_dict(weights)
        return model

    def score(self, weights: dict) -> float:
        """Bits per byte with windows side by side."""
        tg, hp, found = script(), self.hp, self.validation
        windows = tg.sliding_windows(len(found.byte_counts), hp.eval_seq_len, hp.eval_seq_len)
        batch = tg.scoring_batch_tokens(hp, self.world)
        return tg.evaluate(self.model(weights), found.tokens, found.byte_counts, windows, self.world,
                           batch).val_bpb

    def cost(self, rule: str, rows: Callable | None = None, **size: float) -> float:
        """What a file of a size adds, or of matrices alone where that is target_bits."""
        tg, changes = script(), dict(step_rule=rule, attn_bits=8, mlp_bits=8) | size
        model, clock = self.model(self.weights, **changes), tg.Budget("training", self.world, 0.0)
        run = tg.Run(model.hp, self.world, tg.RunLog(None), Path(), 0, clock, clock, {})
        hessians = dict(self.hessians["water" if rule == "water" else "absmax"])
        for name in hessians.keys() & model.max_codes("embed").keys():
            given = hessians.pop(name)
            hessians |= {name: rows(given)} if rows else {}
        blob, _ = tg.fit_artifact(run, model, self.weights, hessians, {})
        packed = {name: t.dequantize() if isinstance(t, tg.QuantizedTensor) else t.float()
                  for name, t in tg.unpack(blob)[1].items()}
        whole = packed if "artifact_limit" in size else {
            name: packed[name] for name in model.max_codes("matrix")}
        return self.score(self.weights | whole) - self.float


def table(folders: list[Path], variants: dict[str, Callable[[Trained], float]]) -> str:
    """The costs in Markdown, with their mean and its ratio to the first row's."""
    trained = [Trained(folder) for folder in tqdm(folders, desc="calibrate", leave=False, disable=None)]
    head = ("variant", *(f"seed {each.seed}" for each in trained), "mean", "of absmax")
    lines, base = [f"| {' | '.join(head)} |", "|---|" + "---:|" * (len(head) - 1)], None
    for name, cost in tqdm(variants.items(), desc="variants", leave=False, disable=None):
        costs = [cost(each) for each in trained]
        mean = fmean(costs)
        base = mean if base is None else base
        cells = (*(f"{cost:+.5f}" for cost in costs), f"{mean:+.5f}", f"{mean / base:.2f}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def of_matrices(rule: str, change: Callable, bits: float) -> Callable[[Trained], float]:
    """A row of VARIANTS."""
    def cost(trained: Trained) -> float:
        with change():
            return trained.cost(rule, target_bits=bits)

    return cost


def program() -> None:
    """The command line."""
    parser = shared.parser(__doc__)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folders of trained runs")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--bits", type=float, default=3.0, help="of a matrix weight in the file (%(default)s)")
    size.add_argument("--bytes", type=int, help="of the file")
    arguments = parser.parse_args()
    if not 1 <= arguments.bits <= 8:
        raise Mistake("--bits must lie between 1 and 8")
    variants = {name: of_matrices(*what, arguments.bits) for name, what in VARIANTS.items()}
    if arguments.bytes:
        variants = {name: lambda trained, what=what: trained.cost(*what, artifact_limit=arguments.bytes)
                    for name, what in FILES.items()}
    print(table(arguments.runs, variants))


if __name__ == "__main__":
    sys.exit(exit_status(program))
