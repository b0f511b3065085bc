"""The three claims of arXiv 2403.14379 on networks that are at hand: what docs/results/truncation.md reports.

Kernels of trained networks are truncated along every cut, each layer alone and all at once, and the networks with all
layers truncated are trained again. Every point is a line of FOLDER/truncation/NET-DATA-SEED.jsonl as soon as it is
known, so that an interrupted run goes on where it stopped. The four-layer CNN is trained here, seed by seed
(checkpoints are in build/truncation); the CIFAR ResNets are those of CONVPARE_SHARED. Test images are shown to
truncated networks; nothing is chosen by them.
"""

import argparse
import math
import os
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from convpare import load_data, load_model
from convpare.blocks import resnet50_cifar, vanilla4
from convpare.data import Data
from convpare.recovery.training import TrainOptions, train_
from convpare.report import truncation_figure, write_figure
from convpare.truncate import TruncateOptions, Truncation, truncate

ROOT = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("CONVPARE_SHARED", ROOT.parent / "shared"))
AGAIN = TrainOptions(epochs=3, lr=0.01, schedule="cosine", crop=4, flip=True, bf16=True)
FROM_SCRATCH = TrainOptions(epochs=12, lr=0.05, crop=4, flip=True, bf16=True)


@dataclass(frozen=True)
class Subject:
    """A network and what is done with it. `seeds`: of its training, or one for weights that are given."""

    net: str
    data: str
    options: TruncateOptions
    seeds: tuple[int, ...] = (0,)

    @property
    def name(self) -> str:
        return f"{self.net}-{self.data}"


SMALL = TruncateOptions(images=2000, retrain=(0.5, 0.25), retrain_images=10_000, training=AGAIN)
SUBJECTS = (
    Subject("vanilla4", "cifar10", SMALL, seeds=(0, 1, 2)),
    Subject("vanilla4", "cifar100", SMALL, seeds=(0, 1, 2)),
    Subject("resnet20", "cifar10", replace(SMALL, images=1000, retrain=(0.25,), fractions=(0.75, 0.5, 0.25, 0.1))),
    Subject("resnet56", "cifar10", replace(SMALL, images=500, retrain=(), fractions=(0.5, 0.25, 0.1))),
    Subject("resnet50", "cifar10", SMALL, seeds=(0, 1, 2)),
    Subject("resnet50", "cifar100", SMALL, seeds=(0, 1, 2)),
)


def data_of(subject: Subject) -> Data:
    return load_data(f"{subject.data}:{SHARED / 'data' / subject.data}")


def network(subject: Subject, seed: int, data: Data, device: str) -> nn.Module:
    """The trained network."""
    if subject.net in ("resnet20", "resnet56"):
        weights = SHARED / "weights" / f"{subject.net}-cifar10.safetensors"
        return load_model(f"convpare:{subject.net}", weights=weights).module.to(device)
    classes = 10 if subject.data == "cifar10" else 100
    torch.manual_seed(seed)
    model = (vanilla4(classes) if subject.net == "vanilla4" else resnet50_cifar(classes)).to(device)
    images, labels = next(data.train.batches(len(data.train)))
    assert labels is not None
    place = ROOT / "build" / "truncation" / f"{subject.name}-{seed}.safetensors"
    place.parent.mkdir(parents=True, exist_ok=True)
    options = replace(FROM_SCRATCH, seed=seed)
    train_(model, images.to(device), labels.to(device), options, checkpoint=place, on_progress=print)
    return model.eval()


def measure(subject: Subject, seed: int, arguments: argparse.Namespace) -> Truncation:
    data = data_of(subject)
    model = network(subject, seed, data, arguments.device)
    store = arguments.folder / "truncation" / f"{subject.name}-{seed}.jsonl"
    store.parent.mkdir(parents=True, exist_ok=True)
    example = torch.zeros(1, *data.train.shape, device=arguments.device)

    def tell(what: str, done: int, total: int) -> None:
        if done % 25 == 0:
            print(f"{subject.name}, seed {seed}: {what} {done}/{total}", flush=True)

    options = replace(subject.options, training=replace(subject.options.training, seed=seed))
    return truncate(model, example, data, options, store=store, on_progress=tell)


def report(found: dict[Subject, list[Truncation]]) -> Iterator[str]:
    yield "# Truncation along cuts\n"
    yield "Written by `python benchmarks/truncation.py`; docs/redundancy.md says what is measured.\n"
    for subject, runs in found.items():
        yield f"## {subject.net} on {subject.data}\n"
        bases = spread([run.base for run in runs])
        nets = "1 network" if len(runs) == 1 else f"{len(runs)} networks"
        yield f"{nets}, {bases} % of {runs[0].images:,} test images before; means over networks.\n"
        yield from depth_table(runs)
        yield from joint_table(subject, runs)
        yield from again_table(runs)


def depth_table(runs: list[Truncation]) -> Iterator[str]:
    """Claims (a) and (c)."""
    yield "| cut | tolerated norm loss, first / last third of the depth | ρ with depth | ρ of norm and accuracy loss |"
    yield "|---|---|---|---|"
    for form in runs[0].claims.depth:
        thirds = [[100 * mean(tolerated(run, form, part)) for run in runs] for part in (False, True)]
        rho = [run.claims.depth[form][0] for run in runs]
        within = [run.claims.within[form] for run in runs]
        first, last = (spread(third) for third in thirds)
        yield f"| {code(form)} | {first} % / {last} % | {spread(rho)} | {spread(within)} |"
    low, high = (mean([run.claims.spread[side] for run in runs]) for side in (0, 1))
    yield ""
    across = spread([run.claims.across for run in runs])
    yield (
        f"Over all cuts of a layer, ρ of norm loss and accuracy loss is {across}; at a norm loss of 10 % the cuts of a "
        f"layer cost {low:.2f} to {high:.2f} points.\n"
    )


def tolerated(run: Truncation, form: str, last: bool) -> list[float]:
    depths = {p.layer: p.depth for p in run.points if p.form == form and not math.isnan(p.depth)}
    return [run.tolerates(layer, form) for layer, depth in depths.items() if (depth > 2 / 3 if last else depth < 1 / 3)]


def joint_table(subject: Subject, runs: list[Truncation]) -> Iterator[str]:
    joint = [[p for p in run.points if math.isnan(p.depth)] for run in runs]
    fractions = sorted({p.fraction for p in joint[0]}, reverse=True)
    yield "| all layers, top-1 at | " + " | ".join(f"{f:g}" for f in fractions) + " |"
    yield "|---" * (len(fractions) + 1) + "|"
    for form in dict.fromkeys(p.form for p in joint[0]):
        cells = [[p.top1 for points in joint for p in points if (p.form, p.fraction) == (form, f)] for f in fractions]
        yield f"| {code(form)} | " + " | ".join(spread(c, 1) if c else "" for c in cells) + " |"
    yield ""


def again_table(runs: list[Truncation]) -> Iterator[str]:
    """Claim (b)."""
    if not runs[0].retrained:
        return
    yield "| trained again for " + f"{runs[0].retrained[0].epochs} epochs | kept | as | before | after |"
    yield "|---|---|---|---|---|"
    for row in runs[0].retrained:
        same = [
            r
            for run in runs
            for r in run.retrained
            if (r.form, r.fraction, r.kind) == (row.form, row.fraction, row.kind)
        ]
        before, after = spread([r.before for r in same], 1), spread([r.top1 for r in same], 1)
        yield f"| {code(row.form)} | {row.fraction:g} | {row.kind} | {before} | {after} |"
    yield ""


def code(form: str) -> str:
    """For a cell of a markdown table."""
    return "`" + form.replace("|", "\\|") + "`"


def mean(values: list[float]) -> float:
    known = [v for v in values if not math.isnan(v)]
    return statistics.mean(known) if known else math.nan


def spread(values: list[float], digits: int = 2) -> str:
    """Mean, and of several standard deviation."""
    known = [v for v in values if not math.isnan(v)]
    if not known:
        return "-"
    deviation = f" ± {statistics.stdev(known):.{digits}f}" if len(known) > 1 else ""
    return f"{statistics.mean(known):.{digits}f}{deviation}"


def parsed() -> argparse.Namespace:
    names = [subject.name for subject in SUBJECTS]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=ROOT / "docs" / "results")
    parser.add_argument("--nets", nargs="+", choices=names, help="default: all but ResNet-50, which is for a GPU")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--figures", type=Path, help="a folder for figures (HTML), one a network")
    arguments = parser.parse_args()
    if arguments.device == "auto":
        arguments.device = "cuda" if torch.cuda.is_available() else "cpu"
    arguments.nets = arguments.nets or [n for n in names if arguments.device != "cpu" or not n.startswith("resnet50")]
    return arguments


def main() -> None:
    arguments = parsed()
    found: dict[Subject, list[Truncation]] = {}
    for subject in SUBJECTS:
        if subject.name in arguments.nets:
            found[subject] = [measure(subject, seed, arguments) for seed in subject.seeds]
            if arguments.figures:
                arguments.figures.mkdir(parents=True, exist_ok=True)
                write_figure(truncation_figure(found[subject][0]), arguments.figures / f"{subject.name}.html")
    (arguments.folder / "truncation.md").write_text("\n".join(report(found)))


if __name__ == "__main__":
    main()
