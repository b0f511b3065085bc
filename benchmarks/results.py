"""The published figures of docs/results, made anew: `make results`, with the real data in CONVPARE_SHARED.

Every point is a command line of convpare (or a function below) whose result is stored in docs/results/points as it
comes, so that an interrupted run goes on where it stopped; delete a file to measure its point again. Nothing is
selected on test images: they are shown once, to the finished network.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from convpare.cli import main
from convpare.graph import self_check, trace
from convpare.zoo import load_model

ROOT = Path(__file__).resolve().parent.parent
POINTS = ROOT / "docs" / "results" / "points"
SEEDS = (0, 1, 2)
RESNET56 = (
    "convpare:resnet56 --weights {shared}/weights/resnet56-cifar10.safetensors --data cifar10:{shared}/data/cifar10"
)
MOBILENET = "convpare:mobilenet_v1_025 --weights {shared}/weights/mobilenet_v1_025-imagenet.safetensors"
IMAGENET = "--test {shared}/data/imagenet500"
ARCHITECTURES = {
    "torchvision:resnet18": 64, "torchvision:resnet50": 64, "torchvision:vgg11_bn": 64, "torchvision:densenet121": 64,
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
            saved = f"-o {folder}/out" if line.startswith("compress") else ""
            filled = line.format(shared=os.environ["CONVPARE_SHARED"])
            main([*filled.split(), *saved.split(), "--json", found])
            return {
                "command": "convpare " + line.format(shared="$CONVPARE_SHARED"),
                **json.loads(Path(found).read_text()),
            }

    return run


def randomise(model: nn.Module, seed: int) -> None:
    """Batch-norm statistics and scales as a trained network has them, so that no channel is without effect."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                for tensor, low, high in (
                    (module.weight, 0.5, 1.5), (module.bias, -0.2, 0.2),
                    (module.running_mean, -0.2, 0.2), (module.running_var, 0.5, 1.5),
                ):  # fmt: skip
                    tensor.copy_(torch.rand(tensor.shape, generator=generator) * (high - low) + low)


def random_keep(graph: Any, share: float, seed: int) -> np.ndarray:
    """Each group loses `share` of its channels, at random."""
    generator = np.random.default_rng(seed)
    keep = graph.keep_all()
    for group in graph.groups:
        gone = min(round(share * group.channels), group.channels - 1)
        keep[group.start + generator.choice(group.channels, gone, replace=False)] = False
    return keep  # type: ignore[no-any-return]


def architecture(spec: str, size: int) -> Callable[[], dict[str, Any]]:
    """The self-check of an architecture with 30 % of every group gone, two seeds."""

    def run() -> dict[str, Any]:
        torch.manual_seed(0)
        model = load_model(spec).module
        randomise(model, 0)
        graph = trace(model, torch.zeros(1, 3, size, size))
        errors = [self_check(model, graph, random_keep(graph, 0.3, seed)).max_relative_error for seed in (0, 1)]
        return {"groups": len(graph.groups), "channels": graph.channels, "input": size, "errors": errors}

    return run


def speed(spec: str) -> Callable[[], dict[str, Any]]:
    """Seconds of trace + plan (l2) + surgery, and of Torch-Pruning's build + prune, in turn; medians of five."""

    def run() -> dict[str, Any]:
        import torch_pruning

        from convpare.graph import removed
        from convpare.planning.planner import PlanOptions, plan

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


def accuracy() -> None:
    point("resnet56-dense", command(f"evaluate {RESNET56}"))
    for criterion in ("qsfm-ssim", "qsfm-psnr", "l1", "l2", "reconstruction"):
        for seed in SEEDS:
            line = f"compress {RESNET56} --macs 0.5173 --params 0.421 --criterion {criterion} --seed {seed}"
            point(f"qsfm-point-{criterion}-{seed}", command(line))
    for seed in SEEDS:
        line = f"compress {RESNET56} --macs 0.5 --criterion reconstruction --seed {seed}"
        point(f"half-{seed}", command(line))
        point(f"half-more-{seed}", command(f"{line} --recover-images 8192 --samples 256"))
        point(f"seventy-{seed}", command(line.replace("0.5", "0.7")))
    point("mobilenet-dense", command(f"evaluate {MOBILENET} --data {{shared}}/data/imagenet500"))
    for criterion in ("qsfm-ssim", "l2", "reconstruction"):
        line = (
            f"compress {MOBILENET} --data {{shared}}/data/imagenet-calib {IMAGENET} --macs 0.75 --criterion {criterion}"
        )
        point(f"mobilenet-{criterion}", command(line))


def structure() -> None:
    for spec, size in ARCHITECTURES.items():
        point(f"check-{spec.partition(':')[2]}", architecture(spec, size))


def timing() -> None:
    for name in ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "densenet121", "mobilenet_v2"):
        point(f"speed-{name}", speed(f"torchvision:{name}"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", nargs="?", choices=("accuracy", "structure", "timing"))
    part = parser.parse_args().part
    if "CONVPARE_SHARED" not in os.environ:
        sys.exit("CONVPARE_SHARED does not name the folder of real data and weights")
    try:
        import torchvision  # noqa: F401
    except RuntimeError:  # a build for another torch, whose models need neither of these
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    for each in [part] if part else ["structure", "timing", "accuracy"]:
        {"accuracy": accuracy, "structure": structure, "timing": timing}[each]()
