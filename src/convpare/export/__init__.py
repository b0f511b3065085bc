"""Files that run without convpare, each compared with the network before it is called done."""

from convpare.export.check import TOLERANCE, CheckOptions
from convpare.export.folder import export_torch
from convpare.export.int8 import export_int8
from convpare.export.onnx_file import OPSET, export_onnx
from convpare.export.program import export_pt2
from convpare.export.result import About, Exported
from convpare.export.verb import Destination, Export, export

__all__ = [
    "OPSET",
    "TOLERANCE",
    "About",
    "CheckOptions",
    "Destination",
    "Export",
    "Exported",
    "export",
    "export_int8",
    "export_onnx",
    "export_pt2",
    "export_torch",
]  # fmt: skip
