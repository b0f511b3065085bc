"""What networks run in: torch as it is, torch.compile, onnxruntime."""

import contextlib
import io
import logging
import platform
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from convpare.errors import ConvpareError
from convpare.modes import eval_mode
from convpare.optional import import_extra

RUNTIMES = ("eager", "compile", "onnxruntime")
TOLERANCE = 1e-2
"""Relative to the largest output: how far a runtime's outputs may be from torch's. Float32 in another order of sums is
a thousand times nearer; another function is not."""

Run = Callable[[], list[Tensor]]


@contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    """Let torch compute on so many cores, and as before afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def ready(runtime: str, model: nn.Module, inputs: Sequence[Tensor]) -> Run:
    """`model` in a runtime: a function that runs it once on `inputs`, with torch's current number of threads.

    What it gives was compared with what `model` gives. Call it in evaluation mode and without gradients.

    Args:
        runtime: one of `RUNTIMES`.

    Raises:
        ConvpareError: there is no such runtime, it is not installed, cannot take the model, or gives other outputs.
    """
    if runtime not in RUNTIMES:
        raise ConvpareError(f"no runtime {runtime!r}; choose one of {', '.join(RUNTIMES)}")
    with eval_mode(model), torch.inference_mode(), torch.random.fork_rng(devices=[]):
        try:
            expected = tensors_of(model(*inputs))
        except Exception as error:  # the model may be anybody's, and may raise anything
            shapes = ", ".join("×".join(map(str, x.shape)) for x in inputs)
            raise ConvpareError(f"{type(model).__name__} does not run on {shapes}: {first_line(error)}") from error
        run = {"eager": _eager, "compile": _compiled, "onnxruntime": _session}[runtime](model, tuple(inputs))
        _compare(runtime, expected, run())
    return run


def processor(device: torch.device) -> str:
    """The name of what computes, as far as the system tells it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        for line in file:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def tensors_of(output: object) -> list[Tensor]:
    """All tensors that a model returns."""
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]


def _eager(model: nn.Module, inputs: tuple[Tensor, ...]) -> Run:
    return lambda: tensors_of(model(*inputs))


def _compiled(model: nn.Module, inputs: tuple[Tensor, ...]) -> Run:
    compiled = torch.compile(model, dynamic=False)
    try:
        compiled(*inputs)
    except Exception as error:  # the compiler and the tools under it may raise anything
        raise ConvpareError(f"torch.compile cannot take {type(model).__name__}: {first_line(error)}") from error
    return lambda: tensors_of(compiled(*inputs))


def _session(model: nn.Module, inputs: tuple[Tensor, ...]) -> Run:
    session = onnx_session(onnx_of(model, inputs), inputs, torch.get_num_threads())
    return lambda: [torch.from_numpy(x) for x in session()]


def onnx_session(content: bytes, inputs: Sequence[Tensor], threads: int) -> Callable[[], list[Any]]:
    """An ONNX model, ready to run on `inputs` with so many threads of the processor.

    Raises:
        ConvpareError: onnxruntime is missing, or cannot load it.
    """
    session = onnx_network(content, threads)
    fed = {known.name: x.detach().cpu().numpy() for known, x in zip(session.get_inputs(), inputs, strict=True)}
    return lambda: list(session.run(None, fed))


def onnx_network(content: bytes, threads: int, *, as_written: bool = False) -> Any:
    """An `onnxruntime.InferenceSession` on the processor; `as_written`: without onnxruntime's own optimizations.

    Raises:
        ConvpareError: onnxruntime is missing, or cannot load it.
    """
    onnxruntime: Any = import_extra("onnxruntime", "onnx")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4  # what goes wrong is raised
    if as_written:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own errors have no common class
        raise ConvpareError(f"onnxruntime cannot load the model: {first_line(error)}") from error


def onnx_of(model: nn.Module, inputs: tuple[Tensor, ...], *, dynamo: bool = True, **options: Any) -> bytes:
    """The model as ONNX, in evaluation mode, for inputs of these shapes unless `options` say otherwise.

    Args:
        dynamo: by the exporter that is built on `torch.export`; else by the older one, on TorchScript.
        options: of `torch.onnx.export`.

    Raises:
        ConvpareError: onnx or onnxscript is missing, or the exporter cannot take the model.
    """
    for module in ("onnx", "onnxscript"):
        import_extra(module, "onnx")
    level = logging.getLogger("torch.onnx").level
    try:
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        with warnings.catch_warnings(), eval_mode(model):
            warnings.simplefilter("ignore")
            if dynamo:
                program: Any = torch.onnx.export(model, inputs, dynamo=True, verbose=False, **options)
                return bytes(program.model_proto.SerializeToString())
            file = io.BytesIO()
            torch.onnx.export(model, inputs, cast(Any, file), dynamo=False, **options)
            return file.getvalue()
    except Exception as error:  # the exporter may raise anything
        raise ConvpareError(f"{type(model).__name__} cannot be exported to ONNX: {first_line(error)}") from error
    finally:
        logging.getLogger("torch.onnx").setLevel(level)


def _compare(runtime: str, expected: Sequence[Tensor], got: Sequence[Tensor]) -> None:
    shapes = [[tuple(x.shape) for x in outputs] for outputs in (expected, got)]
    if shapes[0] != shapes[1]:
        raise ConvpareError(f"{runtime} gives outputs of {shapes[1]}, torch gives {shapes[0]}")
    for mine, its in zip(expected, got, strict=True):
        scale = float(mine.double().abs().max()) if mine.numel() else 0.0
        error = float((mine.double() - its.to(mine.device).double()).abs().max()) if mine.numel() else 0.0
        if not error <= TOLERANCE * scale:
            raise ConvpareError(f"{runtime} gives other outputs than torch: they differ by {error:.3g} of {scale:.3g}")


def first_line(error: Exception) -> str:
    """What went wrong, for a message."""
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0][:300]}"
