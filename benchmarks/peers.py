"""Torch-Pruning and TensorLy at our budgets: the same networks, images and batch-norm recalibration.

`make peers` stores every point in docs/results/points. Torch-Pruning with its defaults (one ratio for all layers) and
each of four criteria, on the inner channels of residual blocks alone: of the whole of these networks it makes what does
not run. TensorLy's partial_tucker of every 3x3 kernel at one fraction of the full ranks, as three plain convolutions.
The ratio and the fraction are the largest networks within the budget. Taylor scores see labels; nothing else does.
"""

import copy
import functools
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from convpare import count, load_data, load_model
from convpare.data import Data
from convpare.evaluation import evaluate
from convpare.factorize.edit import Factorize
from convpare.graph import trace
from convpare.planning.cost import planned_cost
from convpare.recovery import recalibrate_

POINTS = Path(__file__).resolve().parent.parent / "docs" / "results" / "points"
NETWORKS = ("resnet20", "resnet56")
BUDGETS = (0.7, 0.5, 0.35)
CRITERIA = ("l2", "taylor", "bn-scale", "fpgm")
CALIBRATION = 1024  # images of the recalibration, as ours
LABELLED = 256  # images of the Taylor scores
HALVINGS = 10
X = torch.zeros(1, 3, 32, 32)


def pruned(model: nn.Module, criterion: str, ratio: float, data: Data) -> nn.Module:
    """Torch-Pruning's network."""
    import torch_pruning as tp

    small = copy.deepcopy(model)
    importance: Any = {
        "l2": partial(tp.importance.MagnitudeImportance, p=2), "taylor": tp.importance.TaylorImportance,
        "bn-scale": tp.importance.BNScaleImportance, "fpgm": tp.importance.FPGMImportance,
    }[criterion]()  # fmt: skip
    layers = [(n, m) for n, m in small.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    ignored = [module for name, module in layers if ".conv1" not in name]
    pruner = tp.pruner.BasePruner(
        small, X, importance=importance, pruning_ratio=ratio, ignored_layers=ignored,
        in_channel_groups={}, out_channel_groups={}, num_heads={},
    )  # fmt: skip
    if criterion == "taylor":
        for images, labels in data.train.batches(limit=LABELLED, seed=0):
            F.cross_entropy(small(images), labels).backward()
    pruner.step()
    small.zero_grad(set_to_none=True)
    return small


def tuckered(model: nn.Module, fraction: float) -> nn.Module:
    """Every 3x3 convolution as TensorLy's partial Tucker decomposition."""
    import tensorly
    from tensorly.decomposition import partial_tucker

    tensorly.set_backend("pytorch")
    small = copy.deepcopy(model)
    for name, ranks in ranks_of(model, fraction):
        layer: Any = small.get_submodule(name)
        (core, (out, into)), _ = partial_tucker(layer.weight.detach(), rank=list(ranks), modes=[0, 1], init="svd")
        first = nn.Conv2d(layer.in_channels, ranks[1], 1, bias=False)
        middle = nn.Conv2d(ranks[1], ranks[0], 3, layer.stride, layer.padding, bias=False)
        last = nn.Conv2d(ranks[0], layer.out_channels, 1, bias=layer.bias is not None)
        with torch.no_grad():
            for conv, weight in ((first, into.T[:, :, None, None]), (middle, core), (last, out[:, :, None, None])):
                conv.weight.copy_(weight)
            if layer.bias is not None:
                last.bias.copy_(layer.bias)
        parent, _, child = name.rpartition(".")
        setattr(small.get_submodule(parent), child, nn.Sequential(first, middle, last))
    return small.eval()


def ranks_of(model: nn.Module, fraction: float) -> Iterator[tuple[str, tuple[int, int]]]:
    """(out, in) ranks of all 3x3 convolutions but the first, whose inputs are few."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3) and module.in_channels > 3:
            yield name, tuple(max(1, round(fraction * c)) for c in (module.out_channels, module.in_channels))  # type: ignore[misc]


def within(share: Callable[[float], float], budget: float) -> float:
    """The largest number in (0, 1) whose network has at most this share of the MACs; more is larger."""
    low, high = 0.0, 1.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if share(middle) <= budget else (low, middle)
    return low


def measured(small: nn.Module, dense: nn.Module, data: Data) -> dict[str, float]:
    cost, whole = count(small, X).total, count(dense, X).total
    raw = evaluate(small, data.test).top1
    recalibrate_(small, [data.train.tensor(limit=CALIBRATION, seed=0)])
    return {
        "macs": cost.macs / whole.macs, "params": cost.params / whole.params, "top1": raw,
        "top1_recalibrated": evaluate(small, data.test).top1,
    }  # fmt: skip


def main() -> None:
    warnings.simplefilter("ignore")
    shared = os.environ.get("CONVPARE_SHARED") or sys.exit("CONVPARE_SHARED does not name the real data and weights")
    data = load_data(f"cifar10:{shared}/data/cifar10")
    for network in NETWORKS:
        dense = load_model(f"convpare:{network}", weights=f"{shared}/weights/{network}-cifar10.safetensors").module
        graph = trace(dense.eval(), X)
        whole = count(dense, X).total.macs

        def chains(fraction: float, dense: nn.Module = dense, graph: Any = graph, whole: int = whole) -> float:
            edits = [Factorize(name, "tucker2", ranks, ()) for name, ranks in ranks_of(dense, fraction)]
            return planned_cost(graph, graph.keep_all(), edits).macs / whole

        @functools.cache
        def kept_at(budget: float) -> float:
            return within(left, budget)

        def left(kept: float, dense: nn.Module = dense, whole: int = whole) -> float:
            return count(pruned(dense, "l2", 1 - kept, data), X).total.macs / whole

        for budget in BUDGETS:
            made: dict[str, Callable[[], nn.Module]] = {
                f"torch-pruning-{c}": lambda c=c, b=budget, d=dense, kept=kept_at: pruned(d, c, 1 - kept(b), data)
                for c in CRITERIA
            }  # fmt: skip
            made["tensorly-tucker"] = lambda b=budget, d=dense: tuckered(d, within(chains, b))
            for peer, make in made.items():
                path = POINTS / f"peer-{network.removeprefix('resnet')}-{budget}-{peer}.json"
                if not path.exists():
                    found = measured(make(), dense, data)
                    path.write_text(json.dumps(found, indent=1) + "\n")
                    print(path.stem, found, flush=True)


if __name__ == "__main__":
    main()
