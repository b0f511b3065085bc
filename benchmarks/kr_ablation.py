"""Accuracy against K/R, at fixed R and at equal parameters: what docs/kr_ablation.md describes.

Every training is one line of FOLDER/kr_ablation.jsonl, appended when it ends, so that an interrupted run goes on where
it stopped; delete a line to train it again. Trainings come seed by seed, the bottleneck first. Test images are shown
once, to the network after its last epoch. In the end the tables and the two claims are printed as markdown.
"""

import argparse
import functools
import itertools
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from scipy import stats
from torch import Tensor

from convpare.blocks.designs import Design, parameters, width_for_params
from convpare.data import ImageSet, load_data
from convpare.data.moving_digits import moving_digits
from convpare.evaluation import evaluate
from convpare.planning.cost import count
from convpare.points import PointStore
from convpare.recovery.training import TrainOptions, train_

ROOT = Path(__file__).resolve().parent.parent
RATIOS = (1, 2, 4, 8)
INVERTED_RATIOS = (Fraction(1, 6), Fraction(1, 2), 1, 2)
TRAIN_SHOWN = 10_000  # training images that the finished network is shown, without augmentation


@dataclass(frozen=True)
class Sweep:
    """Networks around one: `anchor` with its R at the `fixed` ratios, and with its parameters at the `equal` ratios.

    lean: the largest K/R that counts as lean where lean and wide networks of equal size are compared.
    bf16: whether to autocast, which on a CPU is faster for dense convolutions and slower for depthwise ones.
    """

    anchor: Design
    fixed: tuple[int | Fraction, ...] = RATIOS
    equal: tuple[int | Fraction, ...] = RATIOS
    lean: Fraction = Fraction(2)
    bf16: bool = False

    @property
    def name(self) -> str:
        return f"{self.anchor.kind}-{self.anchor.dims}d"

    def designs(self, part: str) -> list[Design]:
        if part == "fixed":
            return [replace(self.anchor, ratio=Fraction(ratio)) for ratio in self.fixed]
        params = parameters(self.anchor)
        ratios = [replace(self.anchor, ratio=Fraction(ratio)) for ratio in self.equal]
        return [replace(design, rank=width_for_params(design, params)) for design in ratios]


IMAGES = {"blocks": (1, 2, 2), "num_classes": 10, "in_channels": 3}
SWEEPS = (
    Sweep(Design("bottleneck", 12, Fraction(4), **IMAGES), bf16=True),
    Sweep(Design("bottleneck", 8, Fraction(4), dims=3, num_classes=8, in_channels=1), bf16=True),
    Sweep(Design("separable", 16, Fraction(4), **IMAGES)),
    Sweep(Design("inverted", 30, Fraction(1, 2), **IMAGES), INVERTED_RATIOS, INVERTED_RATIOS, lean=Fraction(1, 2)),
    Sweep(Design("resnext", 16, Fraction(4), groups=2, **IMAGES), bf16=True),
    Sweep(Design("shufflenet", 12, Fraction(4), groups=2, **IMAGES)),
)
OPTIONS = {
    2: TrainOptions(epochs=6, batch_size=128, lr=0.1, flip=True),
    3: TrainOptions(epochs=8, batch_size=64, lr=0.1),
}


@dataclass(frozen=True)
class Training:
    """One point: a network, what it is trained on and how."""

    sweep: str
    design: Design
    options: TrainOptions
    data: str
    pixels: int
    device: str

    def key(self) -> dict[str, Any]:
        """What tells one training from another."""
        design = {**asdict(self.design), "ratio": str(self.design.exact_ratio), "blocks": list(self.design.blocks)}
        data = self.data.partition(":")[0]
        return {"data": data, "pixels": self.pixels, "design": design, "options": asdict(self.options)}

    def measure(self) -> dict[str, Any]:
        torch.set_num_threads(1)
        (images, labels), test = dataset(self.data, self.pixels)
        torch.manual_seed(self.options.seed)
        model = self.design.build().to(self.device)
        cost = count(model, torch.zeros(1, *images.shape[1:], device=self.device)).total
        started = time.perf_counter()
        history = train_(model, images.to(self.device), labels.to(self.device), self.options)
        seconds = time.perf_counter() - started
        return {
            "R": self.design.ranks, "K": self.design.channels, "params": cost.params, "macs": cost.macs,
            "train_top1": top1(model, images[:TRAIN_SHOWN], labels[:TRAIN_SHOWN]), "test_top1": top1(model, *test),
            "losses": [round(epoch.loss, 5) for epoch in history], "seconds": round(seconds, 1), "device": self.device,
            "torch": torch.__version__,
        }  # fmt: skip


def top1(model: torch.nn.Module, images: Tensor, labels: Tensor) -> float:
    return evaluate(model, zip(images.split(500), labels.split(500), strict=True)).top1


@functools.cache
def dataset(spec: str, pixels: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(images, labels) to train and to test on."""
    if spec == "moving-digits":
        return tuple((clips.videos, clips.labels) for clips in moving_digits())  # type: ignore[return-value]
    data = load_data(spec)
    assert data.test is not None
    return pooled(data.train, pixels), pooled(data.test, pixels)


def pooled(images: ImageSet, pixels: int) -> tuple[Tensor, Tensor]:
    """All images of a set, averaged down to so many pixels a side."""
    assert images.labels is not None
    window = images.shape[1] // pixels
    return torch.cat([F.avg_pool2d(x, window) for x, _ in images.batches(1000)]), images.labels


def trainings(arguments: argparse.Namespace) -> Iterator[Training]:
    """All points, the most telling first: a sweep after the other, each seed by seed, so that every ratio has one."""
    for sweep in chosen(arguments):
        dims = sweep.anchor.dims
        data = next(spec for spec in arguments.data if dims_of(spec) == dims)
        designs = dict.fromkeys(itertools.chain(sweep.designs("fixed"), sweep.designs("equal")))
        for seed, design in itertools.product(arguments.seeds, designs):
            options = replace(
                OPTIONS[dims], seed=seed, bf16=sweep.bf16, epochs=arguments.epochs or OPTIONS[dims].epochs
            )
            if dims == 2:
                options = replace(options, crop=arguments.pixels // 8)
            pixels = arguments.pixels if dims == 2 else 16
            yield Training(sweep.name, design, options, data, pixels, arguments.device)


def chosen(arguments: argparse.Namespace) -> list[Sweep]:
    dims = [dims_of(spec) for spec in arguments.data]
    return [sweep for sweep in SWEEPS if sweep.anchor.dims in dims and sweep.name in arguments.designs]


def dims_of(spec: str) -> int:
    return 3 if spec == "moving-digits" else 2


def run(arguments: argparse.Namespace, store: PointStore) -> None:
    missing = [training for training in trainings(arguments) if store.get(training.key()) is None][: arguments.limit]
    with multiprocessing.get_context("spawn").Pool(arguments.jobs) as pool:
        for done, (training, found) in enumerate(pool.imap_unordered(measured, missing), 1):
            store.add(training.key(), found)
            name = f"{training.sweep}, K/R {training.design.exact_ratio}, R {found['R']}, seed {training.options.seed}"
            print(
                f"{done}/{len(missing)} {name}: {found['test_top1']:.2f} %, {found['seconds']:.0f} s",
                file=sys.stderr,
                flush=True,
            )


def measured(training: Training) -> tuple[Training, dict[str, Any]]:
    return training, training.measure()


def tables(arguments: argparse.Namespace, store: PointStore) -> str:
    results: dict[tuple[str, Design], list[dict[str, Any]]] = {}
    for training in trainings(arguments):
        point = store.get(training.key())
        results.setdefault((training.sweep, training.design), []).extend([point] if point else [])
    return "\n".join(itertools.chain.from_iterable(section(sweep, results) for sweep in chosen(arguments)))


def section(sweep: Sweep, results: dict[tuple[str, Design], list[dict[str, Any]]]) -> Iterator[str]:
    """Both tables of a sweep with the claim that each tests."""
    for part, title in (("fixed", f"R = {sweep.anchor.rank} at every K/R"), ("equal", "equal parameters")):
        measured = [(d, results[sweep.name, d]) for d in sweep.designs(part) if results[sweep.name, d]]
        yield f"\n### {sweep.name}: {title}\n"
        yield "| K/R | R | K | parameters | MACs | training top-1 | test top-1 | seeds | seconds |"
        yield "|---|---|---|---|---|---|---|---|---|"
        yield from (row(design, points) for design, points in measured)
        yield ""
        accuracies = [(d.exact_ratio, point["test_top1"]) for d, points in measured for point in points]
        yield slope_claim(accuracies, part)
        if part == "equal":
            yield size_claim(accuracies, sweep.lean)


def row(design: Design, points: list[dict[str, Any]]) -> str:
    first = points[0]
    shown = [spread([point[name] for point in points]) for name in ("train_top1", "test_top1")]
    seconds = statistics.median(point["seconds"] for point in points)
    return (
        f"| {design.exact_ratio} | {numbers(design.ranks)} | {numbers(design.channels)} | {first['params']:,} | "
        f"{first['macs']:,} | "
        f"{shown[0]} | {shown[1]} | {len(points)} | {seconds:.0f} |"
    )


def numbers(stages: tuple[int, ...]) -> str:
    return ", ".join(map(str, stages))


def spread(values: list[float]) -> str:
    """Mean and, of several, standard deviation."""
    deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{deviation}"


def slope_claim(accuracies: list[tuple[Fraction, float]], part: str) -> str:
    """Claim 1 (fixed R): accuracy stays as K/R rises. At equal parameters, claim 2: it falls, for R must shrink."""
    if len(accuracies) < 3 or len({ratio for ratio, _ in accuracies}) < 2:
        return "Slope: too few points yet."
    x = [torch.tensor(float(ratio)).log2().item() for ratio, _ in accuracies]
    fit = stats.linregress(x, [accuracy for _, accuracy in accuracies])
    half = float(stats.t.ppf(0.975, len(x) - 2) * fit.stderr)
    low, high = fit.slope - half, fit.slope + half
    seen = "rises" if low > 0 else "falls" if high < 0 else "has no slope that can be told from 0"
    claim, holds = ("stays", low <= 0 <= high) if part == "fixed" else ("falls", high < 0)
    return (
        f"Slope of test top-1 against log2(K/R): {fit.slope:+.2f} points a doubling, 95 % interval [{low:+.2f}, "
        f"{high:+.2f}]: accuracy {seen}. Claim {1 if part == 'fixed' else 2}, that it {claim}, "
        f"{'is consistent with this' if holds else 'is not borne out'}."
    )


def size_claim(accuracies: list[tuple[Fraction, float]], lean: Fraction) -> str:
    """Claim 2 once more: of networks with equal parameters, those with a small K/R are the better ones."""
    ratios = sorted({ratio for ratio, _ in accuracies})
    if not ratios:
        return "Best ratio: no points yet."
    means = {ratio: statistics.mean(a for r, a in accuracies if r == ratio) for ratio in ratios}
    best = max(means, key=lambda ratio: means[ratio])
    small, large = ([a for r, a in accuracies if (r <= lean) == side] for side in (True, False))
    text = f"Best at equal parameters: K/R = {best} ({means[best]:.2f} %)."
    if min(len(small), len(large)) < 2:
        return text
    interval = stats.ttest_ind(small, large, equal_var=False).confidence_interval()
    difference = statistics.mean(small) - statistics.mean(large)
    return (
        f"{text} K/R up to {lean} less K/R above: {difference:+.2f} points, 95 % interval (Welch) "
        f"[{interval.low:+.2f}, {interval.high:+.2f}]."
    )


def parsed() -> argparse.Namespace:
    shared = os.environ.get("CONVPARE_SHARED")
    data = [f"cifar10:{shared}/data/cifar10"] if shared else []
    names = [sweep.name for sweep in SWEEPS]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=ROOT / "docs" / "results", help="where kr_ablation.jsonl is")
    parser.add_argument("--data", nargs="+", default=[*data, "moving-digits"], help="cifar10:PATH, moving-digits")
    parser.add_argument("--designs", nargs="+", default=names, choices=names)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, help="6 for images and 8 for videos unless given")
    parser.add_argument("--pixels", type=int, default=16, choices=(16, 32), help="of a side of the images")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--jobs", type=int, default=2, help="trainings at a time, each on one core")
    parser.add_argument("--limit", type=int, help="at most so many trainings now; 0 prints the tables only")
    arguments = parser.parse_args()
    if arguments.device == "auto":
        arguments.device = "cuda" if torch.cuda.is_available() else "cpu"
    return arguments


if __name__ == "__main__":
    arguments = parsed()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    store = PointStore(arguments.folder / "kr_ablation.jsonl", "training")
    run(arguments, store)
    print(tables(arguments, store))
