"""ONNX: by torch's exporters in turn, until one makes a file that computes what the network computes."""

import json
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import Dim

from convpare.errors import ConvpareError
from convpare.export.check import Check, CheckOptions, Images, Run, on_processor, prepared
from convpare.export.parting import parting
from convpare.export.plain import plain_form
from convpare.export.result import About, Exported, size_of
from convpare.graph.capture import CannotCapture, Inputs, capture, quiet_export
from convpare.optional import import_extra
from convpare.replacing import replaced_file
from convpare.runtimes import first_line, onnx_network, onnx_of, tensors_of

OPSET = 18

Exporter = Callable[[nn.Module, tuple[Tensor, ...], int], bytes]


def export_onnx(
    model: nn.Module,
    example: Inputs,
    path: str | Path,
    images: Images | None = None,
    *,
    about: About = About(),
    options: CheckOptions = CheckOptions(),
    opset: int = OPSET,
) -> Exported:
    """Write a network as ONNX, for batches of any size, once onnxruntime gives with it what torch gives.

    Torch's exporters are tried in turn: the one built on `torch.export` on the network itself, then on its captured
    graph in which numbers follow the batch, then the one on TorchScript.

    Args:
        example: one input with the batch first, or the tuple of inputs.
        images: to compare on; noise without.
        about: written into the file as metadata properties.

    Raises:
        ConvpareError: no exporter takes the network or gives the same outputs (the layer where they part is named), or
            the file cannot be written. What was there before is left as it was.
    """
    path = Path(path)
    with replaced_file(path) as temporary, on_processor(model, example) as (net, args):
        check = prepared(net, args, images, options)
        about.check(check.outputs[0])
        tried: list[str] = []
        for name, exporter in EXPORTERS.items():
            try:
                content = with_metadata(exporter(net, args, opset), about.to_json(args[0]))
                temporary.write_bytes(content)
                difference = checked(net, content, check)
                break
            except ConvpareError as error:
                tried.append(f"{name}: {str(error).rstrip('.')}")
        else:
            reasons = "; ".join(dict.fromkeys(tried))
            raise ConvpareError(f"{type(net).__name__} was not exported to ONNX, nothing was written. {reasons}")
    return Exported(
        path, "onnx", name, size_of(path), difference, check.images, tuple(dict.fromkeys(check.sizes)), check.noise,
        opset, tuple(tried),
    )  # fmt: skip


def runner(content: bytes) -> Run:
    """What onnxruntime computes."""
    session = onnx_network(content, torch.get_num_threads())
    names = [known.name for known in session.get_inputs()]

    def run(inputs: tuple[Tensor, ...]) -> list[Tensor]:
        fed = {name: x.detach().numpy() for name, x in zip(names, inputs, strict=True)}
        return [torch.from_numpy(x) for x in session.run(None, fed)]

    return run


def checked(model: nn.Module, content: bytes, check: Check) -> float:
    """How far the outputs are from torch's.

    Raises:
        ConvpareError: further than they may be; it names the layer.
    """
    differences = check.differences(runner(content))
    worst = int(np.argmax(differences))  # NaN where there is one
    found = differences[worst]
    if not found <= check.options.tolerance:
        where = parting(model, content, check.batches[worst], check.options.tolerance)
        raise ConvpareError(
            f"onnxruntime's outputs differ from torch's by {found:.3g} of the largest output "
            f"(tolerance {check.options.tolerance:g}); {where}"
        )
    return found


def with_metadata(content: bytes, entries: dict[str, Any]) -> bytes:
    """The same model with these metadata properties: text as it is, everything else as JSON."""
    onnx: Any = import_extra("onnx", "onnx")
    loaded = onnx.load_from_string(content)
    onnx.helper.set_model_props(
        loaded, {key: value if isinstance(value, str) else json.dumps(value) for key, value in entries.items()}
    )
    return bytes(loaded.SerializeToString())


def _by_export(model: nn.Module, args: tuple[Tensor, ...], opset: int) -> bytes:
    batch = Dim("batch")
    shapes: Any = tuple({0: batch} for _ in args)
    with quiet_export():
        return onnx_of(model, pairs(args), opset_version=opset, dynamic_shapes=shapes, **_names(model, args))


def _by_graph(model: nn.Module, args: tuple[Tensor, ...], opset: int) -> bytes:
    return _by_export(plain_form(model, args), args, opset)


def _by_script(model: nn.Module, args: tuple[Tensor, ...], opset: int) -> bytes:
    _refuse_branches(model, args)
    names = _names(model, args)
    axes = {name: {0: "batch"} for name in (*names["input_names"], *names["output_names"])}
    return onnx_of(model, pairs(args), dynamo=False, opset_version=opset, dynamic_axes=axes, **names)


def _refuse_branches(model: nn.Module, args: tuple[Tensor, ...]) -> None:
    """A trace holds one way through a forward: it is no export of one that goes by the values of its input.

    Tracing warns of numbers taken from shapes, too; a network that `capture` follows takes them from nothing else.
    """
    try:
        capture(model, pairs(args))
    except CannotCapture as error:
        with warnings.catch_warnings(record=True) as told, torch.no_grad():
            warnings.simplefilter("always")
            try:
                torch.jit.trace(model, pairs(args), check_trace=False)
            except Exception as failure:  # tracing may raise anything
                raise ConvpareError(f"TorchScript cannot trace it: {first_line(failure)}") from failure
        if any(issubclass(warning.category, torch.jit.TracerWarning) for warning in told):  # type: ignore[attr-defined]
            raise ConvpareError("its forward branches on values, and a trace would hold one branch alone") from error


EXPORTERS: dict[str, Exporter] = {
    "torch.export": _by_export, "torch.export of the captured graph": _by_graph, "TorchScript": _by_script,
}  # fmt: skip


def pairs(args: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Two of each input: a batch of one would be taken for a number that never changes."""
    return tuple(x[:1].repeat(2, *[1] * (x.ndim - 1)) for x in args)


def _names(model: nn.Module, args: tuple[Tensor, ...]) -> dict[str, Any]:
    with torch.no_grad():
        outputs = len(tensors_of(model(*args)))
    return {"input_names": _numbered("input", len(args)), "output_names": _numbered("output", outputs)}


def _numbered(name: str, count: int) -> list[str]:
    return [name] if count == 1 else [f"{name}_{number}" for number in range(count)]
