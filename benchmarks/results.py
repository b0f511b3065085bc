"""The published figures of docs/results, made anew: `make results`, with the real data in CONVPARE_SHARED.

Every point is a command line of convpare (or a function below) whose result is stored in docs/results/points as it
comes, so that an interrupted run goes on where it stopped; delete a file to measure its point again. Nothing is
selected on test images: they are shown once, to the finished network.
"""

import argparse
import contextlib
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from convpare.cli import main
from convpare.graph import removed, self_check, trace
from convpare.zoo import load_model

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "graph"))
import checks  # noqa: E402 - helpers of the tests, which are no package
import nets  # noqa: E402

POINTS = ROOT / "docs" / "results" / "points"
SEEDS = (0, 1, 2)
RESNET56 = (
    "convpare:resnet56 --weights {shared}/weights/resnet56-cifar10.safetensors --data cifar10:{shared}/data/cifar10"
)
MOBILENET = "convpare:mobilenet_v1_025 --weights {shared}/weights/mobilenet_v1_025-imagenet.safetensors"
IMAGENET = "--test {shared}/data/imagenet500"
PICTURES = f"--data {{shared}}/data/imagenet-calib {IMAGENET}"
RESNET20 = RESNET56.replace("resnet56", "resnet20")
METHODS = {"prune": "prune", "factorize": "factorize", "mixed": "prune,factorize"}
MIXED = {  # what it is called: the network, its budget
    "mixed-point": (RESNET56, "--macs 0.5173 --params 0.421"),
    **{f"mixed-56-{macs}": (RESNET56, f"--macs {macs}") for macs in (0.5, 0.35, 0.7)},
    **{f"mixed-20-{macs}": (RESNET20, f"--macs {macs}") for macs in (0.5, 0.35, 0.7)},
    **{f"mixed-mobilenet-{macs}": (f"{MOBILENET} {PICTURES}", f"--macs {macs}") for macs in (0.7, 0.5, 0.35)},
}
HALVES = (("half", 0.5, ""), ("half-more", 0.5, " --recover-images 8192 --samples 256"), ("seventy", 0.7, ""))
LABELS = {
    "half": "0.5 of the MACs", "half-more": "0.5, 8,192 images, 256 samples per unknown", "seventy": "0.7 of the MACs",
}  # fmt: skip
ARCHITECTURES = {
    "u-net": 0, "1-d": 0, "3-d": 0, "transposed": 0, "flatten-linear": 0, "torchvision:resnet18": 64,
    "torchvision:resnet50": 64, "torchvision:vgg11_bn": 64, "torchvision:densenet121": 64,
    "torchvision:squeezenet1_0": 64, "torchvision:mobilenet_v2": 64, "torchvision:mobilenet_v3_small": 64,
    "torchvision:efficientnet_b0": 64, "torchvision:shufflenet_v2_x1_0": 64, "torchvision:resnext50_32x4d": 64,
    "torchvision:googlenet": 96, "torchvision:inception_v3": 128, "convpare:resnet56": 32,
    "convpare:mobilenet_v1_025": 96,
}  # fmt: skip


def point(name: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The stored result of this point, or its result now, stored."""
    path = POINTS / f"{name}.json"
    if not path.exists():
        print(f"measuring {name}", flush=True)
        result = measure()
        POINTS.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".tmp").write_text(json.dumps(result, indent=1) + "\n")
        path.with_suffix(".tmp").replace(path)
    return json.loads(path.read_text())  # type: ignore[no-any-return]


def command(line: str) -> Callable[[], dict[str, Any]]:
    """Run a command line of convpare; its --json result, with the command as a reader would type it."""

    def run() -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as folder:
            found = f"{folder}/result.json"
            saved = f"-o {folder}/out --no-sweep" if line.startswith("compress") else ""
            filled = line.format(shared=os.environ["CONVPARE_SHARED"])
            with contextlib.suppress(SystemExit):  # a failed command leaves no file, which the next line reports
                main([*filled.split(), *saved.split(), "--json", found])
            return {
                "command": "convpare " + line.format(shared="$CONVPARE_SHARED"),
                **json.loads(Path(found).read_text()),
            }

    return run


def build(name: str, size: int) -> tuple[nn.Module, tuple[int, ...]]:
    """A network of a zoo, or one of the small ones of the tests, and the shape of its input."""
    own = {"u-net": (nets.UNet, (1, 3, 16, 16)), "1-d": (nets.OneD, (1, 2, 16)), "3-d": (nets.ThreeD, (1, 1, 4, 4, 4))}
    if name in own:
        return own[name][0](), own[name][1]
    if name == "transposed":
        return nets.grouped(1, transposed=True), (1, 3, 8, 8)
    if name == "flatten-linear":
        head = nn.Sequential(nn.Flatten(), nn.Linear(8 * 64, 12), nn.ReLU(), nn.Linear(12, 4))
        return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), head), (1, 3, 8, 8)
    return load_model(name).module, (1, 3, size, size)


def architecture(name: str, size: int) -> Callable[[], dict[str, Any]]:
    """The self-check with 30 % of every group gone at random, two seeds, and how much the function changed by that.

    Batch norms have random scales and the statistics of noise, so that no channel is without effect.
    """

    def run() -> dict[str, Any]:
        torch.manual_seed(0)
        model, shape = build(name, size)
        checks.calibrate(checks.randomise(model), [shape])
        graph = trace(model, torch.zeros(shape))
        keeps = [checks.random_keep(graph, seed) for seed in (0, 1)]
        errors = [self_check(model, graph, keep).max_relative_error for keep in keeps]
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            dense = model.eval()(noise)
            changes = [float((removed(model, graph, k)(noise) - dense).abs().max() / dense.abs().max()) for k in keeps]
        return {"groups": len(graph.groups), "channels": graph.channels, "input": list(shape), "errors": errors,
                "changes": changes}  # fmt: skip

    return run


def speed(spec: str) -> Callable[[], dict[str, Any]]:
    """Seconds of trace + plan (l2) + surgery, and of Torch-Pruning's build + prune, in turn; medians of five."""

    def run() -> dict[str, Any]:
        import torch_pruning

        from convpare.planning.planner import plan
        from convpare.planning.settings import PlanOptions

        torch.set_num_threads(2)
        example = torch.zeros(1, 3, 224, 224)
        ours: dict[str, list[float]] = {"trace": [], "plan": [], "surgery": [], "total": []}
        theirs = []
        for _ in range(6):
            model = load_model(spec).module
            t0 = time.perf_counter()
            graph = trace(model, example)
            t1 = time.perf_counter()
            made = plan(model, example, macs=0.5, criterion="l2", options=PlanOptions(scope="all"), graph=graph)
            t2 = time.perf_counter()
            removed(model, graph, made.keep(graph))
            t3 = time.perf_counter()
            for name, seconds in zip(ours, (t1 - t0, t2 - t1, t3 - t2, t3 - t0), strict=True):
                ours[name].append(seconds)
            last = [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
            t0 = time.perf_counter()
            pruner = torch_pruning.pruner.MagnitudePruner(
                model, example, torch_pruning.importance.MagnitudeImportance(p=2), pruning_ratio=0.3,
                ignored_layers=[last],
            )  # fmt: skip
            pruner.step()
            theirs.append(time.perf_counter() - t0)
        return {
            **{name: statistics.median(seconds[1:]) for name, seconds in ours.items()},
            "torch_pruning": statistics.median(theirs[1:]),
            "threads": 2,
        }

    return run


def share(runtime: str, batch: int) -> Callable[[], dict[str, Any]]:
    """ResNet-50 at half of the MACs and at 0.9 of what that could be in time: the network that was found, timed.

    Weights are random: times do not depend on them.
    """

    def run() -> dict[str, Any]:
        from convpare import CompressOptions, PlanOptions, compress
        from convpare.bench import BenchOptions, bench
        from convpare.planning.layer_times import Target

        torch.manual_seed(0)
        model, example = load_model("torchvision:resnet50").module, torch.zeros(1, 3, 224, 224)
        options = PlanOptions(scope="all", latency=0.5 / 0.9, target=Target(runtime, batch, 2))
        done = compress(model, example, macs=0.5, criterion="l2",
                        options=CompressOptions(options, recover=None))  # fmt: skip
        timed = bench({"dense": model, "small": done.model}, example, BenchOptions((runtime,), (batch,), (2,), 20.0))
        return {**done.to_json(), "bench": timed.to_json()}

    return run


def latency() -> None:
    for runtime in ("eager", "onnxruntime"):
        for batch in (1, 64):
            point(f"latency-{runtime}-{batch}", share(runtime, batch))


def latency_rows() -> list[str]:
    rows = []
    for name, found in stored("latency-").items():
        (setting,) = found["bench"]["settings"]
        runtime, _, batch = name.rpartition("-")
        dense, small = (spread["median"] for spread in setting["milliseconds"])
        rows.append(
            f"| {runtime} | {batch} | {dense:.1f} | {small:.1f} | {setting['speedups'][1]['median']:.2f} | "
            f"{1 / found['achieved']['macs']:.2f} | {setting['share_of_macs_ratio'][1]:.2f} |"
        )
    return rows


def accuracy() -> None:
    point("resnet56-dense", command(f"evaluate {RESNET56}"))
    for criterion in ("qsfm-ssim", "qsfm-psnr", "l1", "l2", "reconstruction"):
        for seed in SEEDS:
            line = f"compress {RESNET56} --macs 0.5173 --params 0.421 --criterion {criterion} --seed {seed}"
            point(f"qsfm-point-{criterion}-{seed}", command(line))
    point("mobilenet-dense", command(f"evaluate {MOBILENET} --data {{shared}}/data/imagenet500"))
    for criterion in ("qsfm-ssim", "l2", "reconstruction"):
        line = f"compress {MOBILENET} {PICTURES} --macs 0.75 --criterion {criterion}"
        point(f"mobilenet-{criterion}", command(line))
    for name, macs, more in HALVES:
        for seed in SEEDS:
            line = f"compress {RESNET56} --macs {macs} --criterion reconstruction --seed {seed}{more}"
            point(f"{name}-{seed}", command(line))


def mixed() -> None:
    for seed in SEEDS:
        for name, (network, budget) in MIXED.items():
            for label, methods in METHODS.items():
                line = f"compress {network} {budget} --methods {methods} --criterion sensitivity --seed {seed}"
                point(f"{name}-{label}-{seed}", command(line))


def training() -> None:
    how = "--macs 0.5173 --params 0.421 --methods prune,factorize --criterion sensitivity --recover distill"
    for seed in SEEDS:
        point(f"distill-point-{seed}", command(f"compress {RESNET56} {how} --seed {seed}"))


def training_rows() -> list[str]:
    """MACs, parameters, accuracy after each stage, gradients of images, seconds of training; a row a seed."""
    rows = []
    for name, p in stored("distill-").items():
        stages = " | ".join(f"{stage['top1']:.2f}" for stage in p["stages"][1:])
        macs, params, trained = *p["achieved"].values(), p["recovery"]["training"]
        rows.append(
            f"| {name.replace('-', ', seed ')} | {macs:.4f} | {params:.4f} | {stages} | "
            f"{trained['gradient_passes']:,} | {trained['seconds']:.0f} |"
        )
    return rows


def structure() -> None:
    for spec, size in ARCHITECTURES.items():
        point(f"check-{spec.rpartition(':')[2]}", architecture(spec, size))


def timing() -> None:
    for name in ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "densenet121", "mobilenet_v2"):
        point(f"speed-{name}", speed(f"torchvision:{name}"))


def stored(prefix: str) -> dict[str, dict[str, Any]]:
    """All points whose name begins so, by the rest of the name."""
    paths = sorted(POINTS.glob(f"{prefix}*.json"))
    return {path.stem.removeprefix(prefix): json.loads(path.read_text()) for path in paths}


def spread(values: list[float]) -> str:
    """Mean and, of several, standard deviation."""
    deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{deviation}"


def accuracy_row(label: str, points: list[dict[str, Any]]) -> str:
    """MACs, parameters, accuracy after surgery and after calibration, seconds of plan + surgery and of calibration."""
    macs, params = (f"{max(p['achieved'][metric] for p in points):.4f}" for metric in ("macs", "params"))
    surgery, final = (spread([p["stages"][at]["top1"] for p in points]) for at in (1, -1))
    seconds = [f"{statistics.median(p['stages'][at]['seconds'] for p in points):.0f}" for at in (1, -1)]
    images = points[0]["recovery"]["images"]
    label = f"{label} ({len(points)} seed{'s' * (len(points) > 1)})"
    return f"| {label} | {macs} | {params} | {surgery} | {final} | {images:,} | {seconds[0]} + {seconds[1]} |"


def seeds_of(name: str) -> list[dict[str, Any]]:
    return [point for rest, point in stored(f"{name}-").items() if rest.isdigit()]


def mixed_rows() -> list[str]:
    return [
        accuracy_row(
            f"{network.split()[0].partition(':')[2]} [{points[0]['stages'][0]['top1']:.2f}], `{budget}`: {label}",
            points,
        )
        for name, (network, budget) in MIXED.items()
        for label in METHODS
        if (points := seeds_of(f"{name}-{label}"))
    ]


def peer_rows() -> list[str]:
    """The peers' networks (benchmarks/peers.py): right after surgery, and after our batch-norm recalibration."""
    return [
        f"| {name.replace('-', ', ', 2)} | {p['macs']:.4f} | {p['params']:.4f} | {p['top1']:.2f} | "
        f"{p['top1_recalibrated']:.2f} |"
        for name, p in stored("peer-").items()
    ]


def tables() -> str:
    """docs/results/README.md, from the stored points."""
    head = (
        "| | MACs | parameters | after surgery | after calibration | images | seconds |\n|---|---|---|---|---|---|---|"
    )
    dense, mobile = (stored(f"{name}-dense")[""] for name in ("resnet56", "mobilenet"))
    criteria = ("qsfm-ssim", "qsfm-psnr", "l1", "l2", "reconstruction")
    checked = [
        f"| {name} | {'×'.join(map(str, p['input']))} | {p['groups']} | {p['channels']:,} | "
        + " | ".join(f"{e:.1e}" for e in p["errors"]) + f" | {min(p['changes']):.2g} |"
        for name, p in stored("check-").items()
    ]  # fmt: skip
    timed = [
        f"| {name} | "
        + " | ".join(f"{p[step]:.2f}" for step in ("trace", "plan", "surgery", "total", "torch_pruning"))
        + " |"
        for name, p in stored("speed-").items()
    ]
    return (ROOT / "benchmarks" / "results.md").read_text().format(
        top1=dense["top1"], images=dense["images"], mobile_top1=mobile["top1"], mobile_top5=mobile["top5"], head=head,
        qsfm="\n".join(accuracy_row(c, seeds_of(f"qsfm-point-{c}")) for c in criteria),
        half="\n".join(accuracy_row(label, seeds_of(name)) for name, label in LABELS.items() if seeds_of(name)),
        mobile="\n".join(
            accuracy_row(c, [stored(f"mobilenet-{c}")[""]]) for c in ("qsfm-ssim", "l2", "reconstruction")
        ),
        commands="\n".join(p["command"] for p in (
            dense, seeds_of("qsfm-point-qsfm-ssim")[0], *(seeds_of(name)[0] for name in LABELS if seeds_of(name)),
            *seeds_of("mixed-point-mixed")[:1], *seeds_of("distill-point")[:1], mobile,
            stored("mobilenet-reconstruction")[""],
        )),
        mixed="\n".join(mixed_rows()), latency="\n".join(latency_rows()), peers="\n".join(peer_rows()),
        training="\n".join(training_rows()), checked="\n".join(checked), timed="\n".join(timed),
    )  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parts = {each.__name__: each for each in (structure, timing, latency, accuracy, mixed, training)}
    parser.add_argument("part", nargs="?", choices=parts)
    part = parser.parse_args().part
    if "CONVPARE_SHARED" not in os.environ:
        sys.exit("CONVPARE_SHARED does not name the folder of real data and weights")
    try:
        import torchvision  # noqa: F401
    except RuntimeError:  # a build for another torch, whose models need neither of these
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    for name in [part] if part else parts:
        parts[name]()
    (ROOT / "docs" / "results" / "README.md").write_text(tables())
