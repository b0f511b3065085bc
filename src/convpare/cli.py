"""The verbs as commands. The only file that knows argument parsing."""

import json
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

try:
    import cyclopts
    from cyclopts import Parameter
except ImportError as error:  # pragma: no cover - the wheel alone
    raise SystemExit(f"the command line needs more packages: pip install convpare[cli] ({error})") from error

import torch
from torch import nn

from convpare import __version__, terminal
from convpare.artifact import check_target, is_artifact, load_artifact, save
from convpare.blocks.digits import train_digits
from convpare.compress import CompressOptions, compress
from convpare.data import Data, Preprocessing, load_data
from convpare.errors import ConvpareError
from convpare.evaluation import evaluate
from convpare.inspection import inspect
from convpare.measurement import measured
from convpare.planning.planner import PlanOptions
from convpare.recovery import LeastSquares, RecoverOptions
from convpare.zoo import load_model

app = cyclopts.App(
    name="convpare",
    help="Find what a convolutional network does not need, remove it, prove that the result is right, say what it cost.",
    version=__version__,
)


@Parameter(name="*")
@dataclass(frozen=True)
class ModelArguments:
    """Which model.

    Attributes:
        weights: a .safetensors, .pt or .pth file (weights only; pickled code is never run)
        input: shape of the input, batch first, such as 1,3,224,224; known for models of torchvision, timm and convpare
        num_classes: outputs of the classifier, for models that are built by name
        model: MODEL that an artifact of your own code was made from (its factory), such as net.py:make
    """

    weights: Path | None = None
    input: str | None = None
    num_classes: int | None = None
    model: str | None = None


@Parameter(name="*")
@dataclass(frozen=True)
class DataArguments:
    """Which images, and how pixels become inputs (defaults: what the model wants).

    Attributes:
        data: digits, cifar10:PATH, cifar100:PATH, a folder of class folders or of images, or a .npz
        mean: subtracted from pixels in [0, 1], one number per channel: 0.485,0.456,0.406
        std: divided by, one number per channel
        resize: pixels of the shorter side
        crop: pixels of the central square
        classes: a .json (folder name to index) or a text file (one class name per line) for class folders
    """

    data: str | None = None
    mean: str | None = None
    std: str | None = None
    resize: int | None = None
    crop: int | None = None
    classes: Path | None = None


@Parameter(name="*")
@dataclass(frozen=True)
class MethodArguments:
    """How channels are chosen.

    Attributes:
        criterion: qsfm-ssim, qsfm-psnr, reconstruction, l1, l2, bn-scale or random
        scope: inner (residual streams keep their width), all, or auto (inner if the budget allows)
        allocation: uniform or global; default: what suits the criterion
        round_to: layers keep multiples of this many channels
        exclude: groups that stay whole
        images: calibration images that the criterion looks at
        rounds: remove in so many steps, looking again before each
        threshold: instead of a budget, remove what the criterion's error rates at or below this (SSIM: 1 - SSIM)
        tap: qsfm: activation (what the next layer reads) or conv
        window: qsfm: global or gaussian SSIM window
        data_range: qsfm: layer, image, or a number
        rule: qsfm: pair, mean or max
        who: qsfm: of a pair goes the one more similar to the total, or of smaller norm
        seed: of the choice of images
    """

    criterion: str = "qsfm-ssim"
    scope: str = "auto"
    allocation: str | None = None
    round_to: int = 1
    exclude: tuple[str, ...] = ()
    images: int = 256
    rounds: int = 1
    threshold: float | None = None
    tap: str | None = None
    window: str | None = None
    data_range: str | None = None
    rule: str | None = None
    who: str | None = None
    seed: int = 0

    def options(self) -> PlanOptions:
        names = ("tap", "window", "data_range", "rule", "who")
        given: dict[str, Any] = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        if _is_number(given.get("data_range")):
            given["data_range"] = float(given["data_range"])
        return PlanOptions(
            self.scope, self.allocation, self.round_to, self.exclude, self.images, self.rounds, self.threshold,
            self.seed, given,
        )  # fmt: skip


@dataclass(frozen=True)
class Opened:
    """A model that was named on the command line."""

    module: nn.Module
    spec: str | None
    input_shape: tuple[int, ...] | None
    preprocessing: Preprocessing | None


@app.command(name="inspect")
def inspect_command(
    model: str,
    /,
    *,
    which: ModelArguments = ModelArguments(),
    data: DataArguments = DataArguments(),
    images: int = 256,
    json_file: Annotated[Path | None, Parameter(name="--json")] = None,
) -> None:
    """What is coupled to what, what each layer costs, what cannot go and why; with --data, how similar channels are.

    Args:
        model: torchvision:NAME, timm:NAME, convpare:NAME, package.module:factory, file.py:factory, or an artifact's folder
        images: images that similarity is measured on
        json_file: write everything to this file as JSON
    """
    opened = _open(model, which)
    shown = _data(data, opened) if data.data else None
    example = _example(which, opened, shown)
    with terminal.progress() as tell:
        found = inspect(opened.module, example, shown, images=images, on_progress=tell)
    terminal.show_inspection(found)
    _write_json(json_file, found.to_json())


@app.command(name="compress")
def compress_command(
    model: str,
    /,
    *,
    output: Annotated[Path, Parameter(name=["--output", "-o"])],
    macs: float | None = None,
    params: float | None = None,
    recover: str = "calibrate",
    recover_images: int = 1024,
    samples: int = 64,
    test: str | None = None,
    limit: int | None = None,
    which: ModelArguments = ModelArguments(),
    data: DataArguments = DataArguments(),
    method: MethodArguments = MethodArguments(),
    json_file: Annotated[Path | None, Parameter(name="--json")] = None,
) -> None:
    """Plan, remove, check, recover, and save the smaller network.

    Args:
        model: torchvision:NAME, timm:NAME, convpare:NAME, package.module:factory, file.py:factory, or an artifact's folder
        output: folder of the artifact; an artifact that is there already is replaced
        macs: budget as a fraction of the MACs, 0.5 for half
        params: budget as a fraction of the parameters
        recover: calibrate (least squares or batch norm, whichever serves; no labels), least-squares, batch-norm or none
        recover_images: calibration images of the recovery
        samples: image positions per unknown that least squares looks at; more is better and slower
        test: DATA whose images accuracy is measured on, where --data is for calibration alone
        limit: measure accuracy on this many test images only
        json_file: write everything that was measured to this file as JSON
    """
    check_target(output)
    opened = _open(model, which)
    images = _data(data, opened, test) if data.data else None
    if images is None and recover != "none":
        raise ConvpareError("recovery needs images: give --data, or --recover none")
    options = CompressOptions(
        method.options(),
        None if recover == "none" else RecoverOptions(recover, recover_images, method.seed, LeastSquares(samples=samples)),
        limit,
    )
    example = _example(which, opened, images)
    with terminal.progress() as tell:
        done = compress(
            opened.module, example, images, macs=macs, params=params, criterion=method.criterion, options=options,
            on_progress=tell,
        )  # fmt: skip
        figures = measured(opened.module, done, example)
    preprocessing = images.preprocessing if images else opened.preprocessing
    save(done.model, output, plan=done.plan, spec=opened.spec, preprocessing=preprocessing, figures=figures.to_json())
    terminal.show_compression(done, figures, output)
    _write_json(json_file, figures.to_json())


@app.command(name="evaluate")
def evaluate_command(
    model: str,
    /,
    *,
    which: ModelArguments = ModelArguments(),
    data: DataArguments = DataArguments(),
    limit: int | None = None,
    json_file: Annotated[Path | None, Parameter(name="--json")] = None,
) -> None:
    """Accuracy of a model or an artifact on the test images of DATA (on all of them, where it has no test split).

    Args:
        model: torchvision:NAME, timm:NAME, convpare:NAME, package.module:factory, file.py:factory, or an artifact's folder
        limit: show this many images only, a fixed random choice
        json_file: write the result to this file as JSON
    """
    opened = _open(model, which)
    if data.data is None:
        raise ConvpareError("evaluate needs labelled images: give --data")
    images = _data(data, opened).evaluation
    with terminal.progress() as tell:
        found = evaluate(
            opened.module, images, limit=limit, on_progress=lambda done, total: tell("accuracy", done, total)
        )
    terminal.show(str(found))
    _write_json(json_file, found.to_json())


@app.command
def demo(*, output: Annotated[Path, Parameter(name=["--output", "-o"])] = Path("demo/digits")) -> None:
    """The whole job in a minute: train a small network on scikit-learn's digits, halve its MACs, recover, save, load back.

    Args:
        output: folder of the artifact
    """
    check_target(output)
    data = load_data("digits")
    with terminal.progress() as tell:
        model, _ = train_digits(on_progress=lambda done, total: tell("training", done, total))
    example = torch.zeros(1, 1, 8, 8)
    terminal.show("A small residual network, trained on 1,442 images of handwritten digits (8x8 pixels).")
    terminal.show_inspection(inspect(model, example, data))
    with terminal.progress() as tell:
        done = compress(model, example, data, macs=0.5, on_progress=tell)
        figures = measured(model, done, example)
    save(done.model, output, plan=done.plan, spec="convpare:digits", preprocessing=data.preprocessing,
         figures=figures.to_json())  # fmt: skip
    terminal.show_compression(done, figures, output)
    again = evaluate(load_artifact(output).module, data.evaluation)
    terminal.show(f"loaded back from {output}: {again}")
    if again.top1 != done.stages[-1].top1:
        raise ConvpareError(f"the artifact's accuracy {again.top1} differs from {done.stages[-1].top1} before saving")


def _open(model: str, which: ModelArguments) -> Opened:
    """A model by spec, or an artifact by folder."""
    if Path(model).is_dir() or is_artifact(model):
        if which.weights is not None:
            raise ConvpareError("an artifact has weights of its own; --weights is for models that are built by name")
        factory = None if which.model is None else (lambda: load_model(str(which.model)).module)
        found = load_artifact(model, factory)
        shape = found.plan.inputs[0] if found.plan else None
        return Opened(found.module, which.model or found.spec, shape, found.preprocessing)
    source = load_model(model, weights=which.weights, num_classes=which.num_classes)
    return Opened(source.module, source.spec, source.input_shape, source.preprocessing)


def _data(arguments: DataArguments, opened: Opened, test: str | None = None) -> Data:
    """The images of --data, with those of --test to measure on."""

    def read(spec: str) -> Data:
        return load_data(
            spec, mean=_numbers(arguments.mean, "--mean"), std=_numbers(arguments.std, "--std"),
            resize=arguments.resize, crop=arguments.crop, default=opened.preprocessing,
            classes=arguments.classes if Path(spec).is_dir() else None,
        )  # fmt: skip

    assert arguments.data is not None
    data = read(arguments.data)
    for name in data.skipped:
        terminal.warn(f"skipped, not a readable image: {name}")
    return data if test is None else data.tested_on(read(test))


def _example(which: ModelArguments, opened: Opened, data: Data | None) -> torch.Tensor:
    """Zeros of the input's shape: as given, of the images, or what is known of the model, in this order."""
    if which.input is not None:
        shape = tuple(_integers(which.input, "--input"))
    elif data is not None:
        shape = (1, *data.train.shape)
    elif opened.input_shape is not None:
        shape = opened.input_shape
    else:
        raise ConvpareError("the shape of the model's input is not known: give --input, such as --input 1,3,224,224")
    parameter = next((p for p in opened.module.parameters() if p.is_floating_point()), torch.zeros(1))
    return torch.zeros(shape, dtype=parameter.dtype, device=parameter.device)


def _numbers(text: str | None, option: str) -> list[float] | None:
    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise ConvpareError(f"{option} is {text!r}; expected numbers with commas between, such as 0.5,0.5,0.5") from error


def _integers(text: str, option: str) -> list[int]:
    parts = text.split(",")
    if not all(part.strip().isdigit() and int(part) > 0 for part in parts):
        raise ConvpareError(f"{option} is {text!r}; expected whole numbers above 0 with commas between, such as 1,3,224,224")
    return [int(part) for part in parts]


def _is_number(text: str | None) -> bool:
    try:
        return text is not None and float(text) >= 0
    except ValueError:
        return False


def _write_json(path: Path | None, content: dict[str, Any]) -> None:
    """Write to a temporary name and move it, so that the file is whole or not there."""
    if path is None:
        return
    try:
        with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            json.dump(content, file, indent=1, allow_nan=False)
            file.write("\n")
        os.replace(file.name, path)
    except OSError as error:
        raise ConvpareError(f"{path} cannot be written: {error}") from error


@contextmanager
def _exit_codes() -> Iterator[None]:
    try:
        yield
    except ConvpareError as error:
        terminal.fail(str(error))
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        terminal.fail("interrupted; nothing was written")
        raise SystemExit(130) from None


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point. Exit codes: 0, 1 for a user's error (one message), 130 when interrupted."""
    with _exit_codes():
        app(list(arguments) if arguments is not None else sys.argv[1:])
