"""8-bit integers by onnxruntime's static quantization: a second ONNX file beside the one in float."""

import contextlib
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from convpare.errors import ConvpareError
from convpare.export.check import Check, CheckOptions, Images, in_batches, largest_of
from convpare.export.onnx_file import runner
from convpare.export.result import Exported, size_of
from convpare.optional import import_extra
from convpare.planning.planner import calibration_images
from convpare.replacing import replaced_file
from convpare.runtimes import first_line

CALIBRATION = 256
"""Images from which the ranges of activations are taken."""
_BATCH = 8


def export_int8(
    source: str | Path,
    path: str | Path,
    images: Images,
    *,
    options: CheckOptions = CheckOptions(images=256),
    calibration: int = CALIBRATION,
) -> Exported:
    """Quantize an ONNX file: int8 weights with a scale for each output channel, int8 activations, in QDQ format.

    Batch norms are folded first. Ranges of activations are the smallest and largest values on calibration images. Such
    a file is never equal to the one in float: it must run on batches of any size and put out numbers, and how far
    these are from the float network's is in the result.

    Args:
        source: ONNX in float, as `export_onnx` writes it.
        images: to calibrate with; others of them to compare on, where there are so many.
        options: `images` is how many are compared on.
        calibration: how many images are looked at for ranges.

    Raises:
        ConvpareError: onnxruntime cannot quantize the file or run the result, or it cannot be written. What was there
            before is left as it was.
    """
    source, path = Path(source), Path(path)
    shown = calibration_images(images, calibration + options.images, options.seed)
    if shown is None or not len(shown):
        raise ConvpareError("int8 needs images to calibrate with")
    seen, compared = shown[:calibration], shown[calibration:] if len(shown) >= calibration + 2 else shown
    if not source.is_file():
        raise ConvpareError(f"there is no file {source}; int8 starts from an ONNX file")
    float_run = runner(source.read_bytes())
    batches = in_batches([compared])
    check = Check(options, batches, tuple(float_run(inputs) for inputs in batches), noise=False)
    with replaced_file(path) as temporary:
        _quantize(source, temporary, seen)
        run = runner(temporary.read_bytes())
        found = [run(inputs) for inputs in batches]
        difference = largest_of(check.differences_of(found))
        if not np.isfinite(difference):
            raise ConvpareError(f"the int8 network puts out NaN or infinity; nothing was written to {path}")
    expected, got = (torch.cat([outputs[0] for outputs in all_outputs]) for all_outputs in (check.outputs, found))
    return Exported(
        path, "int8", "onnxruntime, QDQ", size_of(path), difference, check.images,
        tuple(dict.fromkeys(check.sizes)), noise=False, opset=_opset(path), error=_error(expected, got),
        agreement=_agreement(expected, got),
    )  # fmt: skip


def _quantize(source: Path, path: Path, images: Tensor) -> None:
    quantization: Any = import_extra("onnxruntime.quantization", "onnx")
    preparation: Any = import_extra("onnxruntime.quantization.shape_inference", "onnx")
    onnx: Any = import_extra("onnx", "onnx")
    before = onnx.load(source)
    with tempfile.TemporaryDirectory(prefix="convpare-") as folder, _quiet():
        folded = Path(folder) / "folded.onnx"
        try:
            preparation.quant_pre_process(str(source), str(folded), skip_symbolic_shape=True)
            quantization.quantize_static(
                str(folded), str(path), _reader(before.graph.input[0].name, images, quantization),
                quant_format=quantization.QuantFormat.QDQ, per_channel=True,
                activation_type=quantization.QuantType.QInt8, weight_type=quantization.QuantType.QInt8,
            )  # fmt: skip
        except Exception as error:  # onnxruntime's own errors have no common class
            raise ConvpareError(f"onnxruntime cannot quantize {source}: {first_line(error)}") from error
    after = onnx.load(path)
    onnx.helper.set_model_props(after, {entry.key: entry.value for entry in before.metadata_props})
    onnx.save(after, path)


def _reader(name: str, images: Tensor, quantization: Any) -> Any:
    """Images in batches, as onnxruntime wants to be given them."""

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.batches = iter(images.split(_BATCH))

        def get_next(self) -> dict[str, Any] | None:
            batch = next(self.batches, None)
            return None if batch is None else {name: batch.numpy()}

    return Reader()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the advice that onnxruntime logs to the root logger."""
    level = logging.root.level
    logging.root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logging.root.setLevel(level)


def _opset(path: Path) -> int:
    onnx: Any = import_extra("onnx", "onnx")
    return next(int(known.version) for known in onnx.load(path).opset_import if known.domain in ("", "ai.onnx"))


def _error(expected: Tensor, got: Tensor) -> float:
    return float((expected.double() - got.double()).norm() / expected.double().norm().clamp_min(1e-300))


def _agreement(expected: Tensor, got: Tensor) -> float | None:
    """Per cent of the images on which the highest output is the same; None where outputs are no classes."""
    if expected.ndim != 2 or expected.shape[1] < 2:
        return None
    return 100 * float((expected.argmax(1) == got.argmax(1)).double().mean())
