"""What the parts of STEP_RULE=water are worth on trained models, as a Markdown table.

    python records/steps.py logs/RUN [logs/RUN ...] --bits 3

Each run is one of STAGES=train without QAT. Its matrices are quantised by the script's own functions, one of
Each run is one of STAGES=train without QAT. Its matrices are quantised by the functions of the script, one of
side by side. The cost is the difference to the weights as trained, in bpb.
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
    return scales_instead(lambda weight, *grid, diagonal:
                          script().sigma_scales(weight.flatten(1), *grid)[:, None].expand(weight.shape[:-1]))


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

    def cost(self, rule: str, bits: float) -> float:
        """What quantised matrices add, at so many bits a weight."""
        tg, changes = script(), dict(step_rule=rule, attn_bits=8, mlp_bits=8, target_bits=bits)
        model, clock = self.model(self.weights, **changes), tg.Budget("training", self.world, 0.0)
        run = tg.Run(model.hp, self.world, tg.RunLog(None), Path(), 0, clock, clock, {})
        hessians = self.hessians["water" if rule == "water" else "absmax"]
        blob, _ = tg.fit_artifact(run, model, self.weights, hessians, {})
        matrices = {name: tensor.dequantize() for name, tensor in tg.unpack(blob)[1].items()
                    if name in model.max_codes("matrix")}
        return self.score(self.weights | matrices) - self.float


def table(folders: list[Path], bits: float) -> str:
    """The costs in Markdown, with their mean and its ratio to the first row's."""
    trained = [Trained(folder) for folder in tqdm(folders, desc="calibrate", leave=False, disable=None)]
    head = ("variant", *(f"seed {each.seed}" for each in trained), "mean", "of absmax")
    lines, base = [f"| {' | '.join(head)} |", "|---|" + "---:|" * (len(head) - 1)], None
    for name, (rule, change) in tqdm(VARIANTS.items(), desc="variants", leave=False, disable=None):
        with change():
            costs = [each.cost(rule, bits) for each in trained]
        mean = fmean(costs)
        base = mean if base is None else base
        cells = (*(f"{cost:+.5f}" for cost in costs), f"{mean:+.5f}", f"{mean / base:.2f}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def program() -> None:
    """The command line."""
    parser = shared.parser(__doc__)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folders of trained runs")
    parser.add_argument("--bits", type=float, default=3.0, help="a weight's, in the file (%(default)s)")
    arguments = parser.parse_args()
    if not 1 <= arguments.bits <= 8:
        raise Mistake("--bits must lie between 1 and 8")
    print(table(arguments.runs, arguments.bits))


if __name__ == "__main__":
    sys.exit(exit_status(program))
