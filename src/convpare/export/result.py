"""What an export gives back, and what travels in the files beside the network."""

import hashlib
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from convpare import __version__
from convpare.data import Preprocessing
from convpare.errors import ConvpareError
from convpare.jsonable import finite
from convpare.notebook import html_table
from convpare.planning.plan import Plan


@dataclass(frozen=True)
class About:
    """What is known of a network beside its weights.

    Attributes:
        labels: the names of its outputs.
        preprocessing: what its images go through.
        plan: how it was made smaller.
    """

    labels: tuple[str, ...] | None = None
    preprocessing: Preprocessing | None = None
    plan: Plan | None = None

    def name_of(self, model: nn.Module) -> str:
        """The name of the network's class, which the graph form of a smaller one no longer tells."""
        return self.plan.model if self.plan is not None else type(model).__name__

    def check(self, outputs: Sequence[Tensor]) -> None:
        """Refuse labels that are not those of these outputs.

        Raises:
            ConvpareError: there are more or fewer.
        """
        if self.labels is not None and tuple(outputs[0].shape[1:]) != (len(self.labels),):
            raise ConvpareError(f"there are {len(self.labels):,} labels for outputs of {tuple(outputs[0].shape[1:])}")

    def to_json(self, example: Tensor) -> dict[str, Any]:
        """A dictionary of plain JSON values: only what is known, with the shape of one input."""
        found: dict[str, Any] = {"convpare": __version__, "input": list(example.shape[1:])}
        if self.labels is not None:
            found["labels"] = list(self.labels)
        if self.preprocessing is not None:
            found["preprocessing"] = self.preprocessing.to_json()
        if self.plan is not None:
            text = json.dumps(finite(self.plan.to_json()), sort_keys=True)
            found["plan_sha256"] = hashlib.sha256(text.encode()).hexdigest()
        return found


@dataclass(frozen=True)
class Exported:
    """A file, or a folder of files, that was written and found to be right.

    Attributes:
        path: where it is.
        kind: onnx, pt2, torch or int8.
        exporter: what made it.
        size: bytes of all its files.
        difference: the largest from torch's outputs (of int8: the float file's), as a share of the largest output.
        images: how many inputs it was compared on.
        batches: in batches of these sizes.
        noise: whether they were noise, for want of images.
        opset: of ONNX.
        tried: what did not work before, if anything.
        error: of int8, the difference from the float network's outputs, as a share of their norm.
        agreement: of int8, per cent of the images on which the highest output is the float network's, too.
    """

    path: Path
    kind: str
    exporter: str
    size: int
    difference: float
    images: int
    batches: tuple[int, ...]
    noise: bool
    opset: int | None = None
    tried: tuple[str, ...] = ()
    error: float | None = None
    agreement: float | None = None

    def to_json(self) -> dict[str, Any]:
        return finite({**vars(self), "path": str(self.path)})  # type: ignore[no-any-return]

    def _repr_html_(self) -> str:
        """As a notebook shows it."""
        return html_files([self])


def html_files(files: Sequence[Exported], top1: Sequence[float | None] = ()) -> str:
    """What was written, as a notebook shows it."""
    columns = ("file", "bytes", "made by", "largest difference", "images", "top-1 %")
    rows = [
        (f.path, f.size, f.exporter, f"{f.difference:.2g}", f.images, "" if seen is None else f"{seen:.2f}")
        for f, seen in itertools.zip_longest(files, top1)
    ]  # fmt: skip
    return html_table(columns, rows)


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    return sum(file.stat().st_size for file in ([path] if path.is_file() else path.iterdir()) if file.is_file())
