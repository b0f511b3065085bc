"""The verbs as commands. The only file that knows argument parsing."""

import io
import json
import math
import os
import secrets
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

try:
    import cyclopts
    from cyclopts import Group, Parameter
    from cyclopts.validators import Number
except ImportError as error:  # pragma: no cover - the wheel alone
    raise SystemExit(f"the command line needs more packages: pip install convpare[cli] ({error})") from error

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from convpare import __version__, terminal
from convpare.artifact import check_target, is_artifact, load_artifact, save
from convpare.blocks.digits import train_digits
from convpare.compress import Compression, CompressOptions, compress
from convpare.data import Data, Preprocessing, load_data
from convpare.errors import ConvpareError
from convpare.evaluation import evaluate
from convpare.importance import criteria, get_criterion
from convpare.inspection import inspect
from convpare.measurement import Measured, measured
from convpare.modes import eval_mode
from convpare.planning.planner import PlanOptions
from convpare.planning.solver import Budget
from convpare.recovery import LeastSquares, RecoverOptions
from convpare.zoo import is_builtin, load_model

app = cyclopts.App(
    name="convpare",
    help="Find what a convolutional network does not need, remove it, prove that the result is right, and say what it "
    "cost.\n\nExit codes: 0, 1 (one message says what is wrong), 130 (interrupted; nothing is half-written).",
    version=__version__,
    suppress_keyboard_interrupt=False,
)

_RESULT = Group("Result", sort_key=1)
_BUDGET = Group("Budget", sort_key=2)
_MODEL = Group("Model", sort_key=3)
_IMAGES = Group("Images", sort_key=4)
_METHOD = Group("Which channels go", sort_key=5)
_QSFM = Group("Which channels go, criteria qsfm-ssim and qsfm-psnr", sort_key=6)
_RECOVERY = Group("Recovery", sort_key=7)

_Count = Annotated[int, Parameter(validator=Number(gte=1))]
_CountOrNone = Annotated[int | None, Parameter(validator=Number(gte=1))]
_Model = Annotated[
    str,
    Parameter(
        help="torchvision:NAME, timm:NAME, convpare:NAME, package.module:factory, file.py:factory, or the folder of an "
        "artifact"
    ),
]
_FormArgument = Annotated[
    Literal["module", "graph"],
    Parameter(
        group=_METHOD,
        help="module: the model's own class and forward; graph: the captured graph with its numbers rewritten, which "
        "loads without the model's code",
    ),
]
_Json = Annotated[
    Path | None, Parameter(name="--json", group=_RESULT, help="write everything that was found to this file, as JSON")
]


@Parameter(name="*", group=_MODEL)
@dataclass(frozen=True)
class ModelArguments:
    """Which model.

    Attributes:
        weights: a .safetensors, .pt or .pth file (weights only; pickled code is never run)
        num_classes: outputs of the classifier, for models that are built by name
        model: the MODEL that an artifact of your own code was made from, such as net.py:make
    """

    weights: Path | None = None
    num_classes: _CountOrNone = None
    model: str | None = None


@Parameter(name="*", group=_MODEL)
@dataclass(frozen=True)
class TracedModelArguments(ModelArguments):
    """Which model, and for which input.

    Attributes:
        input: shape of the input, batch first, such as 1,3,224,224; default: that of the images, or what is known of
            the model
    """

    input: str | None = None

    @property
    def shape(self) -> tuple[int, ...] | None:
        """The shape that was given."""
        if self.input is None:
            return None
        parts = [part.strip() for part in self.input.split(",")]
        if not all(part.isdecimal() and part.isascii() and int(part) > 0 for part in parts):
            raise ConvpareError(
                f"--input is {self.input!r}; expected whole numbers above 0 with commas between, batch first, such as "
                "1,3,224,224"
            )
        return tuple(int(part) for part in parts)


@Parameter(name="*", group=_IMAGES)
@dataclass(frozen=True)
class DataArguments:
    """Which images, and how pixels become inputs (defaults: what the model wants).

    Attributes:
        data: digits, cifar10:FOLDER, cifar100:FOLDER, a folder of class folders or of images, or a .npz file
        mean: subtracted from pixels in [0, 1], one number per channel, such as 0.485,0.456,0.406
        std: divided by, one number per channel
        resize: pixels of the shorter side
        crop: pixels of the central square
        classes: for class folders: a .json file (folder name to index) or a text file (one folder name per line)
    """

    data: str | None = None
    mean: str | None = None
    std: str | None = None
    resize: _CountOrNone = None
    crop: _CountOrNone = None
    classes: Path | None = None

    def check(self) -> None:
        """Refuse what would be ignored."""
        given = [name for name, value in vars(self).items() if value is not None]
        if self.data is None and given:
            raise ConvpareError(f"{_option(given[0])} is about images; say with --data which ones")


@Parameter(name="*", group=_IMAGES)
@dataclass(frozen=True)
class TestedDataArguments(DataArguments):
    """Which images, and on which of them accuracy is measured.

    Attributes:
        test: DATA whose images accuracy is measured on, where --data is for calibration alone
        limit: measure accuracy on this many test images only, a fixed random choice
    """

    test: str | None = None
    limit: _CountOrNone = None


@Parameter(name="*", group=_BUDGET)
@dataclass(frozen=True)
class BudgetArguments:
    """How much goes.

    Attributes:
        macs: MACs that may be left, as a fraction: 0.5 for half
        params: parameters that may be left, as a fraction
        threshold: instead of a budget: remove what the criterion's error rates at or below this (qsfm-ssim: 1 - SSIM)
    """

    macs: float | None = None
    params: float | None = None
    threshold: float | None = None

    def check(self) -> None:
        """Find out before long work whether these numbers make sense."""
        wanted = Budget(self.macs, self.params).fractions
        if self.threshold is None and not wanted:
            raise ConvpareError("how much shall go? Give --macs or --params (0.5 for half) or both, or --threshold")
        if self.threshold is not None and wanted:
            raise ConvpareError("--threshold takes the place of a budget; give it without --macs and --params")
        if self.threshold is not None and not 0 <= self.threshold < math.inf:
            raise ConvpareError(f"--threshold is {self.threshold}; expected a finite number, 0 or more, such as 0.1")


@Parameter(name="*", group=_RESULT)
@dataclass(frozen=True)
class ResultArguments:
    """Where the result goes.

    Attributes:
        output: folder of the artifact; an artifact that is there already is replaced
        json_file: write everything that was measured to this file, as JSON
    """

    output: Annotated[Path, Parameter(name=["--output", "-o"])]
    json_file: Annotated[Path | None, Parameter(name="--json")] = None

    def check(self) -> None:
        """Find out before long work whether both can be written."""
        _check_output(self.output)
        _check_json(self.json_file, self.output)


@Parameter(name="*", group=_METHOD)
@dataclass(frozen=True)
class MethodArguments:
    """How channels are chosen.

    Attributes:
        scope: inner: residual streams keep their width; auto: inner if the budget allows it, else all
        allocation: how a budget is spread over the groups; default: what suits the criterion
        round_to: layers keep multiples of this many channels
        exclude: groups that stay whole, with commas between; `convpare inspect` shows their names
        inexact: take marked groups, too, whose removal by nature changes the others
        images: calibration images that the criterion looks at
        rounds: remove in so many steps, looking again before each
        seed: of the choice of images
    """

    criterion: Annotated[str, Parameter(help=", ".join(criteria()))] = "qsfm-ssim"
    scope: Literal["auto", "inner", "all"] = "auto"
    allocation: Literal["uniform", "global"] | None = None
    round_to: _Count = 1
    exclude: Annotated[tuple[str, ...], Parameter(negative="", show_default=False)] = ()
    inexact: Annotated[bool, Parameter(negative="", show_default=False)] = False
    form: _FormArgument = "module"
    images: _Count = 256
    rounds: _Count = 1
    seed: Annotated[int, Parameter(validator=Number(gte=0, lt=2**63))] = 0

    def options(self, threshold: float | None, criterion_options: dict[str, Any]) -> PlanOptions:
        get_criterion(self.criterion)
        exclude = tuple(name.strip() for text in self.exclude for name in text.split(",") if name.strip())
        return PlanOptions(
            scope=self.scope, allocation=self.allocation, round_to=self.round_to, exclude=exclude,
            inexact=self.inexact, images=self.images, rounds=self.rounds, threshold=threshold, seed=self.seed,
            criterion_options=criterion_options,
        )  # fmt: skip


@Parameter(name="*", group=_QSFM)
@dataclass(frozen=True)
class QSFMArguments:
    """The open choices of QSFM.

    Attributes:
        tap: activation (default): the maps that the next layer reads; conv: those that the convolution gives
        window: SSIM over whole maps (global, default) or in gaussian windows
        data_range: dynamic range of the maps: of the whole layer (default), of each image, or a number
        rule: drop one of the most similar pair, again and again (default); or rank by mean or maximal similarity
        who: of a pair goes the one more similar to the total rest (default), or the one of smaller norm
    """

    tap: Literal["activation", "conv"] | None = None
    window: Literal["global", "gaussian"] | None = None
    data_range: str | None = None
    rule: Literal["pair", "mean", "max"] | None = None
    who: Literal["total", "norm"] | None = None

    def options(self, criterion: str) -> dict[str, Any]:
        """What the criterion is given: only what was said."""
        given: dict[str, Any] = {name: value for name, value in vars(self).items() if value is not None}
        if given and not get_criterion(criterion).name.startswith("qsfm"):
            raise ConvpareError(
                f"{_option(next(iter(given)))} is an option of qsfm-ssim and qsfm-psnr; criterion {criterion} has none "
                "such. Leave it out, or choose one of the two with --criterion."
            )
        if self.who == "norm" and self.rule in ("mean", "max"):
            raise ConvpareError(
                f"--who norm chooses within pairs; with --rule {self.rule} there are none, leave it out"
            )
        if self.data_range not in (None, "layer", "image"):
            given["data_range"] = _positive(str(self.data_range))
        return given


@Parameter(name="*", group=_RECOVERY)
@dataclass(frozen=True)
class RecoveryArguments:
    """How accuracy is won back, without labels and gradients.

    Attributes:
        recover: calibrate: least squares or batch norm, whichever serves
        recover_images: calibration images of the recovery
        samples: image positions per unknown that least squares looks at; more is better and slower
    """

    recover: Literal["calibrate", "least-squares", "batch-norm", "none"] = "calibrate"
    recover_images: _Count = 1024
    samples: _Count = 64

    def options(self, seed: int) -> RecoverOptions | None:
        if self.recover == "none":
            return None
        return RecoverOptions(self.recover, self.recover_images, seed, LeastSquares(samples=self.samples))


@dataclass(frozen=True)
class Opened:
    """A model that was named on the command line."""

    name: str
    module: nn.Module
    spec: str | None
    input_shape: tuple[int, ...] | None
    preprocessing: Preprocessing | None
    random: bool  # whether its weights are untrained


@app.command(name="inspect", sort_key=1)
def inspect_command(
    model: _Model,
    /,
    *,
    which: TracedModelArguments = TracedModelArguments(),
    data: DataArguments = DataArguments(),
    images: Annotated[_Count, Parameter(group=_IMAGES, help="images that similarity is measured on")] = 256,
    form: _FormArgument = "module",
    json_file: _Json = None,
) -> None:
    """What is coupled to what, what each layer costs, what cannot go and why; with --data, how similar channels are."""
    _check_json(json_file)
    data.check()
    shape = which.shape
    with terminal.progress() as tell:
        opened = _open(model, which, tell, structure_only=data.data is None)
        shown = _data(data, opened, tell)
        found = inspect(
            opened.module, _example(shape, opened, shown), shown, images=images, form=form, on_progress=tell
        )
    _write_json(json_file, found.to_json())
    terminal.show_inspection(found)


@app.command(name="compress", sort_key=2)
def compress_command(
    model: _Model,
    /,
    *,
    result: ResultArguments,
    budget: BudgetArguments = BudgetArguments(),
    which: TracedModelArguments = TracedModelArguments(),
    data: TestedDataArguments = TestedDataArguments(),
    method: MethodArguments = MethodArguments(),
    qsfm: QSFMArguments = QSFMArguments(),
    recovery: RecoveryArguments = RecoveryArguments(),
) -> None:
    """Plan, remove, check, recover, and save the smaller network as an artifact."""
    for arguments in (result, budget, data):
        arguments.check()
    shape = which.shape
    plan = method.options(budget.threshold, qsfm.options(method.criterion))
    options = CompressOptions(plan, recovery.options(method.seed), data.limit, method.form)
    _check_needs(data, method.criterion, recovery.recover)
    with terminal.progress() as tell:
        opened = _open(model, which, tell)
        images = _data(data, opened, tell, data.test)
        example = _example(shape, opened, images)
        done = compress(
            opened.module, example, images, macs=budget.macs, params=budget.params, criterion=method.criterion,
            options=options, on_progress=tell,
        )  # fmt: skip
        figures = _measure_and_save(opened, done, example, images, result.output, tell)
        _write_json(result.json_file, figures.to_json())
    terminal.show_compression(done, figures, result.output, images.note if images else None)


@app.command(name="evaluate", sort_key=3)
def evaluate_command(
    model: _Model,
    /,
    *,
    which: ModelArguments = ModelArguments(),
    data: DataArguments = DataArguments(),
    limit: Annotated[_CountOrNone, Parameter(group=_IMAGES, help="show only so many, a fixed random choice")] = None,
    json_file: _Json = None,
) -> None:
    """Accuracy of a model or an artifact on the test images of DATA (on all of them, where it has no test split)."""
    _check_json(json_file)
    if data.data is None:
        raise ConvpareError("evaluate needs labelled images: give --data")
    with terminal.progress() as tell:
        opened = _open(model, which, tell)
        images = _data(data, opened, tell)
        assert images is not None
        found = evaluate(
            opened.module, images.evaluation, limit=limit,
            on_progress=lambda done, total: tell("accuracy", done, total),
        )  # fmt: skip
    _write_json(json_file, found.to_json())
    terminal.show(str(found))


@app.command(sort_key=4)
def demo(*, output: Annotated[Path, Parameter(name=["--output", "-o"])] = Path("demo/digits")) -> None:
    """The whole job in a minute: train a small network on digits, halve its MACs, recover, save, load back.

    Args:
        output: folder of the artifact; an artifact that is there already is replaced
    """
    _check_output(output)
    data, example = load_data("digits"), torch.zeros(1, 1, 8, 8)
    with terminal.progress() as tell:
        model, _ = train_digits(on_progress=lambda done, total: tell("training", done, total))
        found = inspect(model, example, data, on_progress=tell)
    terminal.show("A small residual network, trained on 1,442 images of handwritten digits (8x8 pixels).\n")
    terminal.show_inspection(found)
    terminal.show("")
    with terminal.progress() as tell:
        done = compress(model, example, data, macs=0.5, on_progress=tell)
        opened = Opened("convpare:digits", model, "convpare:digits", None, None, random=False)
        figures = _measure_and_save(opened, done, example, data, output, tell)
    terminal.show_compression(done, figures, output, data.note)
    again = evaluate(load_artifact(output).module, data.evaluation)
    terminal.show(f"loaded back from {output}: {again}")
    if again.top1 != done.stages[-1].top1:
        raise ConvpareError(f"the artifact's accuracy {again.top1} differs from {done.stages[-1].top1} before saving")


# ---------------------------------------------------------------------------------------------- models, images, inputs


def _open(model: str, which: ModelArguments, tell: terminal.Tell, *, structure_only: bool = False) -> Opened:
    """A model by spec, or an artifact by folder. `structure_only`: its weights do not matter."""
    tell("opening the model", 0, 1)
    if not model:
        raise ConvpareError("MODEL is empty; give a model such as torchvision:resnet18, or the folder of an artifact")
    opened = _open_artifact(model, which) if Path(model).is_dir() or is_artifact(model) else _build(model, which)
    _check_weights(opened)
    if opened.random and not structure_only:
        terminal.warn(f"the weights of {model} are random: give trained ones with --weights")
    return opened


def _open_artifact(folder: str, which: ModelArguments) -> Opened:
    for name in ("weights", "num_classes"):
        if getattr(which, name) is not None:
            raise ConvpareError(
                f"{folder} is a folder, so an artifact with weights and classes of its own; {_option(name)} is for "
                "models that are built by name"
            )
    factory = None if which.model is None else (lambda: load_model(str(which.model)).module)
    found = load_artifact(folder, factory)
    shape = found.plan.inputs[0] if found.plan else None
    return Opened(folder, found.module, which.model or found.spec, shape, found.preprocessing, random=False)


def _build(model: str, which: ModelArguments) -> Opened:
    if which.model is not None:
        raise ConvpareError(f"--model says what an artifact was made from, but {model!r} is no artifact's folder")
    source = load_model(model, weights=which.weights, num_classes=which.num_classes)
    random = which.weights is None and is_builtin(model)
    return Opened(model, source.module, source.spec, source.input_shape, source.preprocessing, random)


def _check_weights(opened: Opened) -> None:
    """Refuse NaN before it spreads into scores and accuracies."""
    tensors: list[tuple[str, Tensor]] = [*opened.module.named_parameters(), *opened.module.named_buffers()]
    for name, tensor in tensors:
        if not is_lazy(tensor) and tensor.is_floating_point() and tensor.isnan().any():
            raise ConvpareError(f"{name!r} of {opened.name} holds NaN; give a model whose weights are numbers")


def _data(arguments: DataArguments, opened: Opened, tell: terminal.Tell, test: str | None = None) -> Data | None:
    """The images of --data, with those of --test to measure on; None without --data."""
    specs = [spec for spec in (arguments.data, test) if spec is not None]
    if arguments.data is None:
        return None
    mean, std = _numbers(arguments.mean, "--mean"), _numbers(arguments.std, "--std")
    folders = [spec for spec in specs if Path(spec).is_dir() and spec != "digits"]
    found = []
    for spec in specs:
        tell("reading images", 0, 1)
        classes = arguments.classes if spec in folders or not folders else None
        with _naming(spec):
            found.append(load_data(spec, mean=mean, std=std, resize=arguments.resize, crop=arguments.crop,
                                   default=opened.preprocessing, classes=classes))  # fmt: skip
        _try_out(opened, found[-1])
    data = found[0] if len(found) == 1 else found[0].tested_on(found[1])
    for name in data.skipped[:5]:
        terminal.warn(f"skipped, not a readable image: {name}")
    if len(data.skipped) > 5:
        terminal.warn(f"skipped {len(data.skipped) - 5:,} more unreadable images")
    return data


@contextmanager
def _naming(spec: str) -> Iterator[None]:
    """Let every complaint about images say which ones."""
    try:
        yield
    except ConvpareError as error:
        raise ConvpareError(str(error) if spec in str(error) else f"{spec}: {error}") from error


def _try_out(opened: Opened, data: Data) -> None:
    """Run the model on one image, so that what does not suit it is named before the work starts."""
    x, _ = next(data.train.batches(1))
    like = _like(opened.module)
    try:
        with eval_mode(opened.module), torch.no_grad(), torch.random.fork_rng(devices=[]):
            outputs = opened.module(x.to(like.device, like.dtype))
    except Exception as error:  # the model may be anybody's, and may raise anything
        shape = "×".join(map(str, data.train.shape))
        known = "" if opened.input_shape is None else f" It was made for {'×'.join(map(str, opened.input_shape[1:]))}."
        reason = (str(error).strip() or "no message").splitlines()[0][:300]
        raise ConvpareError(
            f"{opened.name} does not run on the images of {data.spec}, which are {shape} (channels, height, width) "
            f"after preprocessing: {type(error).__name__}: {reason}.{known} Give other images, or --resize and --crop."
        ) from error
    if isinstance(outputs, Tensor) and outputs.isnan().any():
        raise ConvpareError(f"{opened.name} gives NaN for the first image of {data.spec}; give other weights or images")


def _example(shape: tuple[int, ...] | None, opened: Opened, data: Data | None) -> Tensor:
    """Zeros of the input's shape: as given, of the images, or what is known of the model, in this order."""
    if shape is None and data is not None:
        shape = (1, *data.train.shape)
    shape = shape or opened.input_shape
    if shape is None:
        raise ConvpareError("the shape of the model's input is not known: give --input, such as --input 1,3,224,224")
    like = _like(opened.module)
    try:
        return torch.zeros(shape, dtype=like.dtype, device=like.device)
    except (RuntimeError, TypeError, OverflowError) as error:
        raise ConvpareError(
            f"--input {','.join(map(str, shape))} does not fit into memory; give a smaller shape"
        ) from error


def _like(module: nn.Module) -> Tensor:
    """A tensor of the type and on the device that the module takes."""
    return next((p for p in module.parameters() if p.is_floating_point()), torch.zeros(1))


def _measure_and_save(
    opened: Opened, done: Compression, example: Tensor, data: Data | None, output: Path, tell: terminal.Tell
) -> Measured:
    tell("measuring latency", 0, 1)
    figures = measured(opened.module, done, example)
    tell("saving", 0, 1)
    preprocessing = data.preprocessing if data else opened.preprocessing
    save(done.model, output, plan=done.plan, spec=opened.spec, preprocessing=preprocessing, figures=figures.to_json())
    return figures


# ------------------------------------------------------------------------------------------------------------- options


def _check_needs(data: DataArguments, criterion: str, recover: str) -> None:
    if data.data is None and get_criterion(criterion).needs_images:
        raise ConvpareError(f"criterion {criterion} looks at feature maps: give images with --data, or --criterion l2")
    if data.data is None and recover != "none":
        raise ConvpareError("recovery needs images: give --data, or --recover none")


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _numbers(text: str | None, option: str) -> list[float] | None:
    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise ConvpareError(
            f"{option} is {text!r}; expected numbers with commas between, such as 0.5,0.5,0.5"
        ) from error


def _positive(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise ConvpareError(f"--data-range is {text!r}; expected layer, image, or a number above 0")
    return number


# -------------------------------------------------------------------------------------------------------------- files


def _check_output(output: Path) -> None:
    if not output.name and str(output) in ("", "."):
        raise ConvpareError("-o names the current folder; an artifact is a folder of its own, such as -o smaller")
    check_target(output)


def _check_json(path: Path | None, output: Path | None = None) -> None:
    """Find out before long work whether the file can be written, and whether anything would be lost."""
    if path is None:
        return
    place = Path(os.path.realpath(path))
    inside = output is not None and place.is_relative_to(os.path.realpath(output))
    if place.is_dir():
        raise ConvpareError(f"--json is {path}, a folder; give the name of a file")
    if inside or is_artifact(place.parent):
        raise ConvpareError(f"--json is {path}, inside an artifact, which holds nothing else; choose another place")
    if not place.parent.is_dir():
        raise ConvpareError(f"--json is {path}, but there is no folder {path.parent}; make it, or choose another place")
    try:
        if place.exists() and not place.is_file():
            raise ConvpareError(f"--json is {path}, which is no ordinary file; give the name of one")
        if place.exists() and not _is_replaceable(place):
            raise ConvpareError(f"--json is {path}, which is there and holds something else; choose another name")
        with _beside(place) as temporary:
            temporary.touch(exist_ok=False)
    except OSError as error:
        raise ConvpareError(f"--json is {path}, which cannot be written: {error}") from error


def _is_replaceable(place: Path) -> bool:
    """Whether a file is empty or looks like what --json writes."""
    with place.open("rb") as file:
        start = file.read(64).lstrip()
    return not start or start.startswith(b"{")


@contextmanager
def _beside(place: Path) -> Iterator[Path]:
    """A name for a temporary file in the same folder, which is gone afterwards."""
    temporary = place.with_name(f".convpare-{secrets.token_hex(4)}.json")
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def _write_json(path: Path | None, content: dict[str, Any]) -> None:
    """Write to a temporary name and move it, so that the file is whole or not there."""
    if path is None:
        return
    place = Path(os.path.realpath(path))
    try:
        with _beside(place) as temporary:
            temporary.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
            os.replace(temporary, place)
    except OSError as error:
        raise ConvpareError(f"{path} cannot be written: {error}") from error


@contextmanager
def _exit_codes() -> Iterator[None]:
    try:
        yield
    except (ConvpareError, cyclopts.CycloptsError) as error:
        terminal.fail(str(error).strip())
        raise SystemExit(1) from None
    except OSError as error:  # such as a full disk under standard output
        terminal.fail(f"{error}; check the disk and the permissions")
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        terminal.fail("interrupted; nothing is half-written")
        raise SystemExit(130) from None


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point. Exit codes: 0, 1 for a user's error (one message), 130 when interrupted."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # where the terminal's encoding has no × or █
    with _exit_codes():
        app(list(arguments) if arguments is not None else sys.argv[1:], exit_on_error=False, print_error=False)
