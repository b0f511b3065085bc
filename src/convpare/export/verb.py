"""The verb: one network, one form, its files with what they were found to be."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from convpare.data import Data
from convpare.errors import ConvpareError
from convpare.evaluation import evaluate
from convpare.export.check import CheckOptions
from convpare.export.folder import export_torch, loaded
from convpare.export.int8 import export_int8
from convpare.export.onnx_file import export_onnx, runner
from convpare.export.program import export_pt2
from convpare.export.result import About, Exported, html_files
from convpare.graph.capture import Inputs
from convpare.jsonable import finite
from convpare.notebook import html_text

EXPORTS: Mapping[str, Callable[..., Exported]] = {"onnx": export_onnx, "pt2": export_pt2, "torch": export_torch}
Tell = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Destination:
    """What is written, and where.

    Attributes:
        kind: onnx, pt2 (torch.export) or torch (a folder of plain PyTorch).
        path: of the file, or the folder.
        int8: of onnx: a second file beside it, in 8-bit integers.
    """

    kind: str
    path: Path
    int8: bool = False

    def __post_init__(self) -> None:
        if self.kind not in EXPORTS:
            raise ConvpareError(f"no form {self.kind!r}; choose one of {', '.join(EXPORTS)}")
        if self.int8 and self.kind != "onnx":
            raise ConvpareError("int8 is a second ONNX file; give it with onnx")

    @property
    def int8_path(self) -> Path:
        return self.path.with_name(f"{self.path.stem}.int8{self.path.suffix}")


@dataclass(frozen=True)
class Export:
    """What was written.

    Attributes:
        model: the name of the network's class.
        files: what was written, the main one first.
        top1: of the network, then of each file in its own runtime: per cent of the test images; None without labels.
        test_images: how many these were.
    """

    model: str
    files: tuple[Exported, ...]
    top1: tuple[float | None, ...]
    test_images: int = 0

    def to_json(self) -> dict[str, Any]:
        return finite({  # type: ignore[no-any-return]
            "model": self.model, "top1": self.top1[0], "test_images": self.test_images,
            "files": [{**file.to_json(), "top1": top1} for file, top1 in zip(self.files, self.top1[1:], strict=True)],
        })  # fmt: skip

    def _repr_html_(self) -> str:
        """As a notebook shows it."""
        known = "" if self.top1[0] is None else f", {self.top1[0]:.2f} % of {self.test_images:,} test images in torch"
        return html_text(self.model + known) + html_files(self.files, self.top1[1:])


def export(
    model: nn.Module,
    example: Inputs,
    destination: Destination,
    data: Data | None = None,
    *,
    about: About = About(),
    options: CheckOptions = CheckOptions(),
    limit: int | None = None,
    on_progress: Tell | None = None,
) -> Export:
    """Write a network for use elsewhere, check it, and measure its accuracy where there are labels.

    Args:
        example: one input with the batch first, or the tuple of inputs.
        data: training images are what is compared on, and what int8 is calibrated with; test images measure accuracy.
        limit: measure accuracy on so many test images only.

    Raises:
        ConvpareError: as `export_onnx`, `export_pt2`, `export_torch` and `export_int8`.
    """
    if destination.int8 and data is None:
        raise ConvpareError("int8 takes the ranges of activations from images: give data")
    tell = on_progress or (lambda *_: None)
    train = None if data is None else data.train
    tell(f"exporting to {destination.kind}", 0, 1)
    files = [EXPORTS[destination.kind](model, example, destination.path, train, about=about, options=options)]
    if destination.int8:
        assert train is not None
        tell("quantizing", 0, 1)
        files.append(export_int8(destination.path, destination.int8_path, train))
    networks = [model, *(opened(file) for file in files)]
    if data is None or data.num_classes is None:
        return Export(about.name_of(model), tuple(files), (None,) * len(networks))
    found = []
    for number, network in enumerate(networks):
        tell(f"accuracy of {'the network' if number == 0 else files[number - 1].path.name}", 0, 1)
        found.append(evaluate(network, data.evaluation, limit=limit))
    return Export(about.name_of(model), tuple(files), tuple(f.top1 for f in found), found[0].images)


def opened(file: Exported) -> nn.Module:
    """What was written, in its own runtime, to be called like the network: in evaluation mode, and as it is."""
    if file.kind == "torch":
        return loaded(file.path)
    if file.kind == "pt2":
        return _Runs(torch.export.load(file.path).module())
    run = runner(file.path.read_bytes())
    return _Runs(lambda *inputs: run(inputs)[0])


class _Runs(nn.Module):
    """A function of tensors in the place of a network; modes mean nothing to it."""

    def __init__(self, run: Callable[..., Any]) -> None:
        super().__init__()
        self._run = [run]  # in a list, lest a module be taken for a part of this one

    def forward(self, *inputs: Tensor) -> Any:
        with torch.no_grad():
            return self._run[0](*(x.contiguous() for x in inputs))
