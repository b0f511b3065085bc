"""One check over the zoos: all torchvision models and all timm models of at most 100 M parameters that convolve.

`make zoo` writes docs/results/zoo.json, a record a model as it comes, and zoo.md, the tables. An interrupted run goes
on where it stopped. Weights are random and no parameter is constant, so that a wrong surgery changes the outputs.
"""

import argparse
import contextlib
import copy
import gc
import importlib.metadata
import io
import json
import math
import multiprocessing
import os
import re
import signal
import statistics
import sys
import time
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from convpare.errors import ConvpareError
from convpare.graph import Graph, check, removed, self_check, trace, zeroed
from convpare.graph.structure import Form
from convpare.planning.cost import count, total_cost
from convpare.planning.plan import Plan
from convpare.planning.planner import plan

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "graph"))
import checks  # noqa: E402 - helpers of the tests, which are no package

FORMS: tuple[Form, ...] = ("module", "graph")
LINKED: Form = "linked"  # too, of models that are captured in parts
PEER = "torch_pruning"
PEER_SECONDS = 60
TOLERANCE = 1e-9
LARGEST = 100e6  # parameters, of timm's models
LARGE = 0.7e9  # MACs from which on the self-check runs on a smaller input
TRANSFORMERS = ("matmul", "bmm", "baddbmm", "einsum", "scaled_dot_product_attention", "lstm")
MIXERS = ("mlp_mixer",)
CONVOLUTIONS = nn.modules.conv._ConvNd
NORMS = nn.modules.batchnorm._BatchNorm

Record = dict[str, Any]
Inputs = tuple[Tensor, ...]
T = TypeVar("T")
_kept: list[Any] = []

ABOUT = """Written by `make zoo`; benchmarks/zoo.py says what is measured, and how. {versions}. Left out: {left_out}.
Measured so far, cheapest first: {count} of {total} models. A record may be older than the engine; without it in
zoo.json the model is measured anew.

Prunable: the share of the MACs that a removal can lower, 0 for a net that cannot be captured. Error: of the self-check
in float64 with 30 % of every group gone, relative to the largest output; effect: the same between the dense net and the
one with zeros. Torch-Pruning with its defaults at a ratio of one half: "runs" if its net has the same output shapes,
"exact" if it is the dense one with zeros in place of what is gone, to 1e-9: not so by nature where a layer norm counts
its channels. CNN: a family without attention, recurrence or products of feature maps."""

IN_PARTS = """Detectors: what torch.export can follow of them, see docs/operators.md. In the linked form channels go
that one part hands to another, too."""


def import_zoos() -> None:
    """Import torchvision, also a build for another torch: its models need two operators of its library at most."""
    warnings.simplefilter("ignore")
    try:
        import torchvision
    except RuntimeError:
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _kept.append(library)
        import torchvision
    if not torchvision.extension._has_ops() and torchvision.ops.boxes._assert_has_ops is not _nothing:
        library = torch.library.Library("torchvision", "IMPL")
        library.impl("nms", nms, "CPU")
        _kept.append(library)
        torchvision.ops.boxes._assert_has_ops = _nothing
    import timm  # noqa: F401


def _nothing() -> None:
    """There are operators now."""


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Non-maximum suppression in plain torch."""
    from torchvision.ops import box_iou

    order, kept = scores.argsort(descending=True, stable=True), []
    while len(order):
        kept.append(order[0])
        overlap = box_iou(boxes[order[:1]], boxes[order[1:]])[0]
        order = order[1:][~(overlap > iou_threshold)]
    return torch.stack(kept) if kept else order


def names() -> list[str]:
    import timm
    import torchvision

    theirs = [n for n in torchvision.models.list_models() if not n.startswith("quantized_")]
    return [f"torchvision:{n}" for n in theirs] + [f"timm:{n}" for n in timm.list_models()]


def build(name: str) -> Any:
    """A model of a zoo with random weights."""
    import timm
    import torchvision

    library, _, plain = name.partition(":")
    if library == "timm":
        return timm.create_model(plain, pretrained=False)
    kind = torchvision.models.get_model_builder(plain).__module__.split(".")[2]
    kwargs: Record = {"weights_backbone": None} if kind in ("segmentation", "detection") else {}
    if kind == "detection" and "ssd" not in plain:
        kwargs |= {"min_size": 320, "max_size": 320}
    if "rcnn" in plain:
        kwargs["rpn_post_nms_top_n_test"] = 100
    return torchvision.models.get_model(plain, weights=None, **kwargs)


def shapes_of(name: str, model: Any) -> list[tuple[int, ...]]:
    """The shapes of the inputs, batch 1."""
    library, _, plain = name.partition(":")
    if library == "timm":
        return [(1, *model.pretrained_cfg["input_size"])]
    kind = type(model).__module__.split(".")[2]
    if kind == "optical_flow":
        return [(1, 3, 128, 128)] * 2
    if kind == "video":
        side = 224 if plain == "s3d" or plain.startswith("mvit") else 112
        return [(1, 3, 16, side, side)]
    side = 320 if kind == "detection" else 299 if plain == "inception_v3" else 224
    return [(1, 3, side, side)]


def inventory(name: str) -> Record:
    """What the choice and the order of models need: no weight is made, where the model allows it."""
    try:
        with torch.device("meta"):
            model = build(name)
    except Exception:  # whatever a model's constructor does with its numbers
        model = build(name)
    params = sum(p.numel() for p in model.parameters())
    pixels = sum(math.prod(shape[2:]) for shape in shapes_of(name, model))
    convolutions = sum(isinstance(m, CONVOLUTIONS) for m in model.modules())
    return {"params": params, "convolutions": convolutions, "guess": params * pixels}


def prepared(name: str) -> tuple[nn.Module, Inputs]:
    """The model in evaluation mode, such that every parameter has an effect, and noise for it."""
    torch.manual_seed(0)
    model = build(name)
    shapes = shapes_of(name, model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.is_floating_point() and p.numel() and bool((p == p.flatten()[0]).all()):
                p.copy_(varied(p, generator))
    checks.calibrate(model, shapes)
    return model, tuple(noise(shapes, torch.float32))


def varied(p: Tensor, generator: torch.Generator) -> Tensor:
    """Random numbers in place of a constant: around one for a scale, around zero for what was zero."""
    if p.flatten()[0] != 0:
        return torch.rand(p.shape, generator=generator) + 0.5
    if p.ndim < 2:
        return torch.rand(p.shape, generator=generator) - 0.5
    return torch.randn(p.shape, generator=generator) / math.sqrt(p[0].numel())


def noise(shapes: Sequence[tuple[int, ...]], dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]


def outputs(model: nn.Module, inputs: Sequence[Tensor]) -> list[Tensor]:
    """All floating-point tensors that the model returns."""
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        found = [x for x in tree_leaves(model.eval()(*inputs)) if isinstance(x, Tensor) and x.is_floating_point()]
    return [x.clone() for x in found]


def difference(expected: Sequence[Tensor], got: Sequence[Tensor]) -> float:
    """The largest relative difference of two nets' outputs."""
    return float(np.max([checks.relative_difference(a, b) for a, b in zip(expected, got, strict=True)]))


class Notes:
    """The record of one model as it grows. Every phase is announced to the parent, which may have to end it."""

    def __init__(self, send: Callable[[Record], None]) -> None:
        self.record: Record = {}
        self.send = send

    def phase(self, part: str, phase: str, work: Callable[[], T]) -> T | None:
        """The result of `work`; its seconds, and the class and first line of what it raises, are noted."""
        entry = self.record.setdefault(part, {"seconds": {}})
        self.send({**self.record, "now": [part, phase]})
        started = time.perf_counter()
        try:
            return work()
        except Exception as error:  # a model may raise anything
            entry.setdefault("failed", {})[phase] = first_line(error)
            return None
        finally:
            entry["seconds"][phase] = round(time.perf_counter() - started, 3)


def first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"[:400]


def measure(name: str, parts: Sequence[str], notes: Notes) -> None:
    """Fill the record of a model with these parts, which are forms or the peer."""
    forms = [form for form in (*FORMS, LINKED) if form in parts]
    if forms:
        measure_ours(name, forms, notes)
    if PEER in parts and "failed" not in notes.record.get("model", {}):
        measure_peer(name, notes)


def measure_ours(name: str, forms: Sequence[Form], notes: Notes) -> None:
    built = notes.phase("model", "build", lambda: prepared(name))
    if built is None:
        return
    model, inputs = built
    notes.record["model"] |= {
        "family": type(model).__module__.removeprefix("timm.models.").removeprefix("torchvision.models."),
        "class": type(model).__name__,
        "params": sum(p.numel() for p in model.parameters()),
        "inputs": [list(x.shape) for x in inputs],
        "attention": any(has_heads(m) for m in model.modules()),
    }
    for form in forms:
        measure_form(model, inputs, form, notes)


def has_heads(module: nn.Module) -> bool:
    named = "Attention" in type(module).__name__ and hasattr(module, "num_heads")
    return named or isinstance(module, nn.MultiheadAttention | nn.RNNBase)


def measure_form(model: nn.Module, inputs: Inputs, form: Form, notes: Notes) -> None:
    """Everything about one way to capture the model."""
    run = partial(notes.phase, form)
    if form == "graph" and notes.record.get("module", {}).get("macs", 0) > LARGE:
        inputs = tuple(noise(smaller_shapes(model, tuple(tuple(x.shape) for x in inputs)), torch.float32))
    graph = run("trace", lambda: trace(model, inputs, form=form))
    entry = notes.record[form]
    if graph is None:
        entry["captured"] = "no"
        return
    entry["captured"] = "parts" if getattr(graph, "parts", ()) else "whole"
    entry |= run("structure", lambda: structure(graph)) or {}
    keep = checks.random_keep(graph, 0)
    if not keep.all():
        entry |= run("check", lambda: checked(model, graph)) or {}
        if form != "graph":
            entry |= run("effect", lambda: effect(model, inputs, graph, keep)) or {}
    if any("macs_at_half" in notes.record.get(other, {}) for other in FORMS):
        return  # the module form reached the budget; the graph form can do no less
    made = run("plan", lambda: planned(model, inputs, graph))
    if isinstance(made, Plan):
        entry |= run("count", lambda: counted(model, inputs, graph, made)) or {}
    elif made:
        entry["reachable"] = made


def structure(graph: Graph) -> Record:
    reasons: Counter[str] = Counter()
    for f in graph.frozen:
        if f.reason != checks.OUTPUT:
            reasons[re.sub(r" in (?!the |an? )\S+| on \d\S*", "", f.reason)] += f.channels  # no module, no shape
    units = graph.units
    marked = np.zeros(graph.channels + 1, bool)  # the last stands for -1
    for group in graph.groups:
        marked[group.units] = group.inexact is not None
    exact = replace(graph, units={axis: np.where(marked[u], -1, u) for axis, u in units.items()})
    return {
        "macs": total_cost(graph, graph.keep_all()).macs,
        "groups": len(graph.groups),
        "channels": graph.channels,
        "prunable": round(prunable(exact), 4),
        "prunable_marked": round(prunable(graph), 4),
        "reasons": dict(reasons.most_common(3)),
        "not_counted": dict(graph.not_counted),
        "unreached": len(graph.unreached),
    }


def prunable(graph: Graph) -> float:
    """The share of the MACs that a removal can lower: all but those between frozen outputs and frozen inputs."""

    def frozen(axis: tuple[str, int]) -> float:
        units = graph.units.get(axis)
        return 1.0 if units is None else float((units < 0).mean())

    macs = [layer.positions * math.prod(graph.shapes[layer.weight]) for layer in graph.layers]
    free = [m * (1 - frozen(x.out) * frozen(x.into)) for m, x in zip(macs, graph.layers, strict=True)]
    return sum(free) / max(sum(macs), 1)


def checked(model: nn.Module, graph: Graph) -> Record:
    if graph.form == "module" and total_cost(graph, graph.keep_all()).macs > LARGE and not graph.parts:
        graph = replace(graph, inputs=smaller_shapes(model, graph.inputs))
    found = self_check(model, graph, checks.random_keep(graph, 0))
    return {
        "exact": found.passed,
        "error": number(found.max_relative_error),
        "checked_at": [list(shape) for shape in graph.inputs],
        **({} if found.rounding is None else {"rounding": number(found.rounding)}),
    }


def smaller_shapes(model: nn.Module, shapes: tuple[tuple[int, ...], ...]) -> tuple[tuple[int, ...], ...]:
    """Half the side, rounded to a multiple of 32, where the model runs on it."""
    halves = tuple((*shape[:-2], *(max(32, 32 * round(side / 64)) for side in shape[-2:])) for shape in shapes)
    try:
        outputs(model, noise(halves, torch.float32))
    except Exception:  # a model may raise anything
        return shapes
    return halves


def effect(model: nn.Module, inputs: Inputs, graph: Graph, keep: np.ndarray) -> Record:
    """How much the removal changes what the self-check compares: a check that sees no change is blind."""
    dense = zeroed(model, graph, keep)
    if graph.parts:  # a detector may find nothing in noise
        calls = check.calls_on_noise(model, graph, 0)
        pairs = [check.outputs_of(net.double(), calls) for net in (copy.deepcopy(model), dense)]
    else:
        pairs = [outputs(net, inputs) for net in (model, dense)]
    return {"effect": number(difference(*pairs))}


def planned(model: nn.Module, inputs: Inputs, graph: Graph) -> Plan | float:
    """Half of the MACs by l2, or what share can be reached."""
    if not graph.groups:
        return 1.0
    try:
        return plan(model, inputs, macs=0.5, criterion="l2", graph=graph)
    except ConvpareError as error:
        if found := re.search(r"infeasible: .* at best ([\d.]+) can", str(error)):
            return float(found[1])
        raise


def counted(model: nn.Module, inputs: Inputs, graph: Graph, made: Plan) -> Record:
    macs = count(removed(model, graph, made.keep(graph)), inputs).total.macs
    return {"macs_at_half": round(macs / made.before.macs, 4), "as_planned": macs == made.after.macs}


def number(x: float) -> float | str:
    return float(f"{x:.3g}") if math.isfinite(x) else str(x)


class TooSlow(BaseException):
    """Raised by the alarm; no Exception, so that nothing takes it for the model's own."""


@contextlib.contextmanager
def limit(seconds: float) -> Iterator[None]:
    """Stop the body after so many seconds of processor time, which other work on the machine does not count toward."""

    def ring(*_: object) -> None:
        raise TooSlow

    signal.signal(signal.SIGPROF, ring)
    signal.setitimer(signal.ITIMER_PROF, seconds, 1)  # again every second, should a bare except swallow it
    try:
        yield
    except TooSlow as slow:
        raise TimeoutError(f"no answer in {seconds} s of processor time") from slow
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def measure_peer(name: str, notes: Notes) -> None:
    """Torch-Pruning with its defaults at a ratio of one half, and whether its net is the dense one without channels."""
    run = partial(notes.phase, PEER)
    built = run("build", lambda: distinct(name))
    entry = notes.record[PEER]
    if built is None:
        return
    dense, inputs, expected = built
    entry |= {"runs": False, "exact": None, "dtype": str(inputs[0].dtype).removeprefix("torch.")}
    entry["checked_at"] = [list(x.shape) for x in inputs]
    small = run("prune", lambda: pruned(copy.deepcopy(dense), inputs, widths(expected)))
    got = run("forward", lambda: outputs(small, inputs)) if small is not None else None
    if small is None or got is None:
        return
    entry["runs"] = [x.shape for x in got] == [x.shape for x in expected]
    before, after = (sum(p.numel() for p in m.parameters()) for m in (dense, small))
    entry["params_left"] = round(after / before, 4)
    if entry["runs"] and inputs[0].dtype == torch.float64:
        error = run("check", lambda: oracle(dense, small, inputs, got))
        entry |= {"exact": error is not None and error <= TOLERANCE, "error": None if error is None else number(error)}


def distinct(name: str) -> tuple[nn.Module, Inputs, list[Tensor]]:
    """The model with no two elements of a parameter or statistic alike, in float64 where it runs so; its outputs.

    The input of a large one is smaller, as for our own check.
    """
    model, inputs = prepared(name)
    if macs_of(model, inputs) > LARGE:
        inputs = tuple(noise(smaller_shapes(model, tuple(tuple(x.shape) for x in inputs)), torch.float32))
    precise = tuple(x.double() for x in inputs)
    try:
        outputs(copy.deepcopy(model).double(), precise)
    except Exception:  # a model may raise anything
        return model, inputs, outputs(model, inputs)
    model = model.double()
    generator = torch.Generator().manual_seed(2)
    statistics_ = [x for m in model.modules() if isinstance(m, NORMS) for x in (m.running_mean, m.running_var)]
    with torch.no_grad():
        for x in [*model.parameters(), *statistics_]:
            if x is not None and x.is_floating_point():
                x.add_(1e-3 * torch.rand(x.shape, generator=generator, dtype=x.dtype))
    return model, precise, outputs(model, precise)


def macs_of(model: nn.Module, inputs: Inputs) -> float:
    """About how many; counted without a capture, which not every model allows."""
    with FlopCounterMode(display=False) as counter:
        outputs(model, inputs)
    return counter.get_total_flops() / 2


def widths(expected: Sequence[Tensor]) -> set[int]:
    """What may be the number of classes."""
    return {x.shape[1] for x in expected if x.ndim > 1}


def pruned(model: nn.Module, inputs: Inputs, classes: set[int]) -> nn.Module:
    import torch_pruning as tp

    out = {m: getattr(m, "out_features", getattr(m, "out_channels", None)) for m in model.modules()}
    ignored = [m for m in out if isinstance(m, nn.Linear | CONVOLUTIONS) and out[m] in classes]
    with limit(PEER_SECONDS):
        pruner = tp.pruner.BasePruner(
            model, inputs if len(inputs) > 1 else inputs[0], importance=tp.importance.MagnitudeImportance(p=2),
            pruning_ratio=0.5, ignored_layers=ignored,
            in_channel_groups={}, out_channel_groups={}, num_heads={},  # its defaults, which keep the last net's layers
        )  # fmt: skip
        pruner.step()
    return model


def oracle(dense: nn.Module, small: nn.Module, inputs: Inputs, got: Sequence[Tensor]) -> float:
    """The error of the pruned net against the dense one with zeros where an element is in the pruned net no more.

    Elements are found by their values, so that nothing of the pruner's bookkeeping is believed.
    """
    left = {**dict(small.named_parameters()), **dict(small.named_buffers())}
    with torch.no_grad():
        for name, tensor in [*dense.named_parameters(), *dense.named_buffers()]:
            if tensor.shape != left[name].shape:
                tensor.mul_(survivors(tensor, left[name]))
    return difference(outputs(dense, inputs), got)


def survivors(whole: Tensor, part: Tensor) -> Tensor:
    """A mask of the elements of `whole` that are in `part`, by value."""
    flat, wanted = whole.flatten(), part.flatten()
    order = flat.argsort()
    found = order[torch.searchsorted(flat[order], wanted).clamp(max=len(flat) - 1)]
    if not torch.equal(flat[found], wanted):
        raise LookupError(f"a parameter of shape {tuple(part.shape)} has elements that the dense net's has not")
    mask = torch.zeros_like(flat, dtype=torch.bool)
    mask[found] = True
    return mask.reshape(whole.shape)


def work(pipe: Connection) -> None:
    """A worker: takes (name, parts), sends records, the last without "now"."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent sees to it
    torch.set_num_threads(1)
    import_zoos()
    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            name, parts = pipe.recv()
            notes = Notes(pipe.send)
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                measure(name, parts, notes)
            gc.collect()
            pipe.send(notes.record)


class Worker:
    """A long-lived process, and what it is doing."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=work, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()
        self.name = ""  # of the model at hand
        self.record: Record = {}

    def give(self, name: str, parts: Sequence[str]) -> None:
        self.name, self.record, self.started = name, {}, time.monotonic()
        self.pipe.send((name, parts))

    def memory(self) -> int:
        """Bytes that it holds."""
        try:
            pages = Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]
        except (OSError, IndexError):
            return 0
        return int(pages) * os.sysconf("SC_PAGE_SIZE")

    def take(self) -> bool:
        """Receive a record; whether it is the last of this model."""
        if not self.record:
            self.started = time.monotonic()  # only now: a new process imports for some seconds
        try:
            self.record = self.pipe.recv()
        except (EOFError, ConnectionResetError):
            if not self.record:
                sys.exit("a worker does not start; see above")
            self.fail("the process ended")
            return True
        return "now" not in self.record

    def fail(self, reason: str) -> None:
        """Note why this model has no more than the record at hand."""
        part, phase = self.record.pop("now", ["model", "build"])
        before = spent(self.record)
        entry = self.record.setdefault(part, {"seconds": {}})
        entry["seconds"][phase] = round(time.monotonic() - self.started - before, 3)
        entry.setdefault("failed", {})[phase] = reason
        if part in (*FORMS, LINKED):
            entry.setdefault("captured", "no")
        self.stop()

    def stop(self) -> None:
        self.pipe.close()  # an idle one ends by itself
        self.process.join(0 if self.name else 5)
        self.process.kill()
        self.process.join()


def run(store: "Store", tasks: Sequence[tuple[str, list[str]]], jobs: int, seconds: float) -> None:
    """Measure the tasks, cheapest first, on `jobs` processes; a model that takes too long or too much is given up."""
    queue, total = deque(tasks), len(tasks)
    bound = 0.8 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / jobs
    workers = [Worker() for _ in range(min(jobs, total))]
    try:
        while queue or any(w.name for w in workers):
            for i in [i for i, w in enumerate(workers) if not w.name][: len(queue)]:
                if not workers[i].process.is_alive() or workers[i].memory() > bound / 4:
                    workers[i].stop()
                    workers[i] = Worker()
                workers[i].give(*queue.popleft())
            busy = {w.pipe: w for w in workers if w.name}
            ready = {busy[pipe] for pipe in wait(list(busy), 0.2) if isinstance(pipe, Connection)}
            for w in busy.values():
                done = w in ready and w.take()
                if not done and time.monotonic() - w.started > seconds:
                    w.fail(f"no answer in {seconds:g} s")
                elif not done and w.memory() > bound:
                    w.fail(f"more than {bound / 2**30:.1f} GiB")
                elif not done:
                    continue
                name, w.name = w.name, ""
                store.add(name, w.record)
                if left := store.todo(name):  # it was given up before it came to these
                    queue.append((name, left))
                else:
                    print(f"{total - len(queue):>5}/{total} {line(name, store.models[name])}", flush=True)
    finally:
        for w in workers:
            w.stop()


class Store:
    """zoo.json: versions, sizes of all models, records by name."""

    def __init__(self, folder: Path, wanted: Sequence[str]) -> None:
        self.path, self.wanted = folder / "zoo.json", wanted
        data = json.loads(self.path.read_text()) if self.path.exists() else {}
        packages = ("torch", "torchvision", "timm", "convpare", "torch-pruning")
        self.versions = {name: importlib.metadata.version(name) for name in packages}
        self.sizes: dict[str, Record] = data.get("sizes", {})
        self.models: dict[str, Record] = data.get("models", {})

    def add(self, name: str, record: Record) -> None:
        self.models[name] = self.models.get(name, {}) | record
        self.save()

    def todo(self, name: str, again: bool = False) -> list[str]:
        """The wanted parts that are not measured yet, or not well; none where the model cannot be built."""
        record = self.models.get(name, {})
        wrong = {part for _, part, *_ in failures(name, record)}
        if "model" in wrong:
            return list(self.wanted) if again else []
        wanted = [*self.wanted, LINKED] if in_parts(record) else self.wanted
        return [part for part in wanted if part not in record or (again and part in wrong)]

    def save(self) -> None:
        """Write all, a line a model, as a whole or not at all."""
        blocks = [f'"versions": {json.dumps(self.versions)}']
        for title, rows in (("sizes", self.sizes), ("models", self.models)):
            lines = (f"  {json.dumps(name)}: {json.dumps(rows[name], allow_nan=False)}" for name in sorted(rows))
            blocks.append(f'"{title}": {{\n' + ",\n".join(lines) + "\n }")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial_path = self.path.with_suffix(".tmp")
        partial_path.write_text("{\n " + ",\n ".join(blocks) + "\n}\n")
        partial_path.replace(self.path)


def spent(record: Record) -> float:
    return sum(sum(part.get("seconds", {}).values()) for part in record.values())


def peer(entry: Record) -> str:
    if not entry.get("runs"):
        return "no"
    return "exact" if entry["exact"] else "runs" if entry["exact"] is None else "inexact"


def percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(c).replace("|", "\\|") for c in cells) + " |" for cells in lines)


def is_cnn(records: Sequence[Record]) -> bool:
    """No attention by name, no product of feature maps in any graph, no linear layers over positions."""
    products = {op for r in records for form in FORMS for op in r.get(form, {}).get("not_counted", {})}
    others = any(r["model"].get("attention") or r["model"].get("family") in MIXERS for r in records)
    return not products & set(TRANSFORMERS) and not others


def summary(records: Sequence[Record]) -> list[object]:
    """The cells of a row: how many models, then of each form what was found, then of the peer."""
    cells: list[object] = [len(records)]
    for form in FORMS:
        entries = [r[form] for r in records if form in r]
        captured = Counter(e["captured"] for e in entries)
        shares = [e.get("prunable", 0.0) for e in entries]
        tried = [e for e in entries if "exact" in e or "check" in e.get("failed", {})]
        errors = [float(e["error"]) for e in tried if "error" in e]
        exact = sum(e.get("exact", False) for e in tried)
        cells += [
            " / ".join(str(captured[kind]) for kind in ("whole", "parts", "no")),
            f"{percent(statistics.median(shares))} / {percent(min(shares))}" if shares else "-",
            f"{np.max(errors):.1e}" if errors else "-",
            "-" if not tried else "all" if exact == len(tried) else f"{exact} of {len(tried)}",
        ]
    peers = [r[PEER] for r in records if PEER in r]
    counts = [sum(bool(e.get(key)) for e in peers) for key in ("runs", "exact")]
    return [*cells, *(f"{n} of {len(peers)}" if peers else "-" for n in counts)]


def tables(store: Store) -> str:
    """zoo.md."""
    models = store.models
    families: dict[tuple[str, str], list[str]] = {}
    for name in sorted(models):
        families.setdefault((name.partition(":")[0], models[name]["model"].get("family", "not built")), []).append(name)
    cnn = {key: is_cnn([models[n] for n in members]) for key, members in families.items()}
    head = ["models"]
    for form in FORMS:
        head += [f"{form}: whole / parts / no", "prunable: median / least", "worst error", "exact"]
    head += ["Torch-Pruning runs", "and is exact"]
    chosen = {
        "all": list(models),
        **{library: [n for n in models if n.startswith(f"{library}:")] for library in ("torchvision", "timm")},
        "families that are pure CNNs": [n for key, members in families.items() if cnn[key] for n in members],
        "other families": [n for key, members in families.items() if not cnn[key] for n in members],
    }
    totals = [[label, *summary([models[n] for n in members])] for label, members in chosen.items() if members]
    rows = [
        [*key, "CNN" if cnn[key] else "", *summary([models[n] for n in members])]
        for key, members in sorted(families.items())
    ]
    full = ["model", "M parameters", "GMACs"]
    for form in FORMS:
        full += [f"{form}: captured", "prunable", "error", "effect", "MACs asked 0.5"]
    left_out = Counter(reason for n, size in store.sizes.items() if (reason := excluded(n, size)))
    return "\n\n".join([
        "# The zoos", ABOUT.format(
            versions=", ".join(f"{name} {version}" for name, version in store.versions.items()),
            count=len(models), total=sum(not excluded(n, size) for n, size in store.sizes.items()),
            left_out=", ".join(f"{n} {reason}" for reason, n in left_out.items()) or "none",
        ),
        table(["", *head], totals), "## Families", table(["library", "family", "", *head], rows),
        "## What keeps channels", table(["reason", *FORMS], reasons(list(models.values()))), "## Failures",
        table(["model", "part", "phase", "message"], [f for n in sorted(models) for f in failures(n, models[n])]),
        "## Captured in parts", IN_PARTS, table(
            ["model", "prunable: module form", "linked form", "error", "effect", "MACs asked 0.5"],
            [linked_row(n, models[n]) for n in sorted(models) if in_parts(models[n])],
        ),
        "## Models", table([*full, "Torch-Pruning", "seconds"], [model_row(n, models[n]) for n in sorted(models)]),
    ]) + "\n"  # fmt: skip


def reasons(records: Sequence[Record]) -> list[list[object]]:
    """In how many models a reason is among the three that keep most channels, by form."""
    found = {form: Counter(x for r in records for x in r.get(form, {}).get("reasons", {})) for form in FORMS}
    every = sum(found.values(), Counter())
    return [[reason, *(found[form][reason] for form in FORMS)] for reason, _ in every.most_common(30)]


def failures(name: str, record: Record) -> list[list[str]]:
    rows = []
    for part in ("model", *FORMS, LINKED):
        entry = record.get(part, {})
        rows += [[name, part, phase, reason] for phase, reason in entry.get("failed", {}).items()]
        if entry.get("exact") is False:
            known = entry.get("rounding")
            why = "" if known is None else f"; the last bits of the weights alone change the outputs by {known}"
            rows.append([name, part, "check", f"relative error {entry['error']}{why}"])
        if entry.get("as_planned") is False:
            rows.append([name, part, "count", "not the cost that was planned"])
    return rows


def in_parts(record: Record) -> bool:
    return bool(record.get("module", {}).get("captured") == "parts")


def linked_row(name: str, record: Record) -> list[object]:
    e = record.get(LINKED, {})
    shares = [percent(entry.get("prunable")) for entry in (record["module"], e)]
    return [name, *shares, e.get("error", "-"), e.get("effect", "-"), at_half(record["module"] | e)]


def at_half(entry: Record) -> object:
    return entry.get("macs_at_half") or (f"≥ {entry['reachable']}" if "reachable" in entry else "-")


def model_row(name: str, record: Record) -> list[object]:
    macs = next((record[form]["macs"] for form in FORMS if "macs" in record.get(form, {})), None)
    cells: list[object] = [name, f"{record['model'].get('params', 0) / 1e6:.1f}", f"{macs / 1e9:.2f}" if macs else "-"]
    for form in FORMS:
        e = record.get(form, {})
        found = [e.get("captured", "-"), percent(e.get("prunable")), e.get("error", "-"), e.get("effect", "-")]
        cells += [*found, at_half(e)]
    return [*cells, peer(record[PEER]) if PEER in record else "-", f"{spent(record):.0f}"]


def line(name: str, record: Record) -> str:
    """One line of progress."""
    row = [
        f"{name:<44}",
        *map(str, model_row(name, record)[1:]),
        *(": ".join(f[1:])[:140] for f in failures(name, record)),
    ]
    return " | ".join(row)


def excluded(name: str, size: Record) -> str | None:
    if not size["convolutions"]:
        return "without a convolution"
    return "of timm above 100 M parameters" if name.startswith("timm:") and size["params"] > LARGEST else None


def selection(store: Store, pattern: str) -> list[str]:
    """The names that match and are not left out, cheapest first."""
    matching = [name for name in names() if re.search(pattern, name)]
    unknown = [name for name in matching if name not in store.sizes]
    if unknown:
        print(f"sizes of {len(unknown)} models", flush=True)
    for name in unknown:
        store.sizes[name] = inventory(name)
    store.save()
    return sorted((n for n in matching if not excluded(n, store.sizes[n])), key=lambda n: store.sizes[n]["guess"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", metavar="PATTERN", help="a regular expression, found in LIBRARY:NAME")
    parser.add_argument("--again", action="store_true", help="measure anew what failed of ours")
    parser.add_argument("--limit", type=int, help="how many models to measure")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--seconds", type=float, default=300, help="after which a model is given up")
    parser.add_argument("--peers", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--folder", type=Path, default=ROOT / "docs" / "results")
    args = parser.parse_args()
    import_zoos()
    store = Store(args.folder, [*FORMS, PEER] if args.peers else FORMS)
    try:
        tasks = [(name, parts) for name in selection(store, args.only) if (parts := store.todo(name, args.again))]
        run(store, tasks[: args.limit], args.jobs, args.seconds)
    except KeyboardInterrupt:
        sys.exit("interrupted; what was measured is kept, and the next run goes on from there")
    finally:
        (args.folder / "zoo.md").write_text(tables(store))


if __name__ == "__main__":
    main()
