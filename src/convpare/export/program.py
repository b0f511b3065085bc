"""`.pt2`: the program that torch.export captures, which torch alone loads."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from convpare.errors import ConvpareError
from convpare.export.check import CheckOptions, Images, largest_of, on_processor, prepared
from convpare.export.fresh import LOAD_PT2, outputs_elsewhere
from convpare.export.onnx_file import pairs
from convpare.export.plain import plain_form
from convpare.export.result import About, Exported, size_of
from convpare.graph.capture import Inputs, quiet_export
from convpare.replacing import replaced_file
from convpare.runtimes import first_line

EXTRA = "convpare.json"
"""The file in the archive that says what is known of the network: `torch.export.load(path, extra_files={EXTRA: ""})`"""


def export_pt2(
    model: nn.Module,
    example: Inputs,
    path: str | Path,
    images: Images | None = None,
    *,
    about: About = About(),
    options: CheckOptions = CheckOptions(),
) -> Exported:
    """Write a network as `.pt2`, for batches of any size, once a process without convpare gives the same with it.

    Args:
        example: one input with the batch first, or the tuple of inputs.
        images: to compare on; noise without.
        about: written into the archive, as JSON.

    Raises:
        ConvpareError: torch.export cannot follow the network, neither itself nor its captured graph; the outputs
            differ; or the file cannot be written. What was there before is left as it was.
    """
    path = Path(path)
    with replaced_file(path) as temporary, on_processor(model, example) as (net, args):
        check = prepared(net, args, images, options)
        about.check(check.outputs[0])
        tried: list[str] = []
        name = "torch.export"
        try:
            program = _program(net, args)
        except ConvpareError as error:
            tried.append(f"{name}: {error}")
            name = "torch.export of the captured graph"
            try:
                program = _program(plain_form(net, args), args)
            except ConvpareError as second:
                raise ConvpareError(f"{type(net).__name__} was not exported. {tried[0]}; {name}: {second}") from error
        known = {EXTRA: json.dumps(about.to_json(args[0]), indent=1)}
        torch.export.save(program, temporary, extra_files=known)
        difference = largest_of(check.differences_of(outputs_elsewhere(LOAD_PT2, temporary, check.batches)))
        if not difference <= options.tolerance:
            raise ConvpareError(
                f"loaded again, the program's outputs differ from the network's by {difference:.3g} of the largest "
                f"output (tolerance {options.tolerance:g}); nothing was written to {path}"
            )
    return Exported(
        path, "pt2", name, size_of(path), difference, check.images, tuple(dict.fromkeys(check.sizes)), check.noise,
        tried=tuple(tried),
    )  # fmt: skip


def _program(model: nn.Module, args: tuple[Tensor, ...]) -> ExportedProgram:
    batch = Dim("batch")
    shapes: Any = tuple({0: batch} for _ in args)
    with torch.no_grad(), quiet_export():
        try:
            return torch.export.export(model, pairs(args), dynamic_shapes=shapes, strict=False)
        except Exception as error:  # torch.export raises many types
            raise ConvpareError(
                f"torch.export cannot capture {type(model).__name__} for batches of any size: {first_line(error)}"
            ) from error
