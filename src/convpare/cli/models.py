"""Models, images and inputs that are named on the command line."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from convpare import terminal
from convpare.artifact import Artifact, is_artifact, load_artifact
from convpare.cli.arguments import DataArguments, ModelArguments, numbers, option
from convpare.data import Data, Preprocessing, load_data
from convpare.errors import ConvpareError
from convpare.export import About, CheckOptions
from convpare.export.check import prepared
from convpare.modes import eval_mode
from convpare.planning.plan import Plan
from convpare.zoo import is_builtin, load_model

FAR = 4.0  # times as many pixels


@dataclass(frozen=True)
class Opened:
    """A model that was named on the command line."""

    name: str
    module: nn.Module
    spec: str | None
    input_shape: tuple[int, ...] | None
    preprocessing: Preprocessing | None
    random: bool  # whether its weights are untrained
    plan: Plan | None = None  # of an artifact: how it was made smaller
    labels: tuple[str, ...] | None = None  # of an artifact: the names of its outputs
    weights: Path | None = None  # the file that they came from
    num_classes: int | None = None


def open_model(model: str, which: ModelArguments, tell: terminal.Tell) -> Opened:
    """A model by spec, or an artifact by folder."""
    tell("opening the model", 0, 1)
    opened = _open_artifact(model, which) if _is_artifact(model) else _build(model, which)
    _check_weights(opened)
    if opened.random:
        terminal.warn(f"the weights of {model} are random: give trained ones with --weights")
    return opened


def open_to_time(model: str, which: ModelArguments, tell: terminal.Tell) -> Opened:
    """As `open_model`, one of several: each takes those arguments that are for its kind. Random weights will do."""
    tell("opening the model", 0, 1)
    if _is_artifact(model):
        return _open_artifact(model, replace(which, weights=None, num_classes=None))
    return _build(model, replace(which, model=None))


def _is_artifact(model: str) -> bool:
    if not model:
        raise ConvpareError("MODEL is empty; give a model such as torchvision:resnet18, or the folder of an artifact")
    return Path(model).is_dir() or is_artifact(model)


def _open_artifact(folder: str, which: ModelArguments) -> Opened:
    for name in ("weights", "num_classes"):
        if getattr(which, name) is not None:
            raise ConvpareError(
                f"{folder} is a folder, so an artifact with weights and classes of its own; {option(name)} is for "
                "models that are built by name"
            )
    found = artifact_of(folder, which)
    shape = found.plan.inputs[0] if found.plan else None
    labels = found.figures.get("labels")
    named = tuple(map(str, labels)) if isinstance(labels, list) else None
    return Opened(
        folder, found.module, which.model or found.spec, shape, found.preprocessing, False, found.plan, named
    )  # fmt: skip


def artifact_of(folder: str, which: ModelArguments) -> Artifact:
    """The artifact in a folder; `which.model` builds what it was made of, where that is code of the user's own."""
    return load_artifact(folder, None if which.model is None else (lambda: load_model(str(which.model)).module))


def _build(model: str, which: ModelArguments) -> Opened:
    if which.model is not None:
        raise ConvpareError(f"--model says what an artifact was made from, but {model!r} is no artifact's folder")
    source = load_model(model, weights=which.weights, num_classes=which.num_classes)
    random = which.weights is None and is_builtin(model)
    return Opened(
        model, source.module, source.spec, source.input_shape, source.preprocessing, random, weights=which.weights,
        num_classes=which.num_classes,
    )  # fmt: skip


def _check_weights(opened: Opened) -> None:
    """Refuse NaN before it spreads into scores and accuracies."""
    tensors: list[tuple[str, Tensor]] = [*opened.module.named_parameters(), *opened.module.named_buffers()]
    for name, tensor in tensors:
        if not is_lazy(tensor) and tensor.is_floating_point() and tensor.isnan().any():
            raise ConvpareError(f"{name!r} of {opened.name} holds NaN; give a model whose weights are numbers")


def open_data(arguments: DataArguments, opened: Opened, tell: terminal.Tell, test: str | None = None) -> Data | None:
    """The images of --data, with those of --test to measure on; None without --data."""
    specs = [spec for spec in (arguments.data, test) if spec is not None]
    if arguments.data is None:
        return None
    mean, std = numbers(arguments.mean, "--mean"), numbers(arguments.std, "--std")
    folders = [spec for spec in specs if Path(spec).is_dir() and spec != "digits"]
    found = []
    for spec in specs:
        tell("reading images", 0, 1)
        classes = arguments.classes if spec in folders or not folders else None
        with _naming(spec):
            found.append(load_data(spec, mean=mean, std=std, resize=arguments.resize, crop=arguments.crop,
                                   default=opened.preprocessing, classes=classes))  # fmt: skip
        _compare_sizes(opened, found[-1])
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


def _compare_sizes(opened: Opened, data: Data) -> None:
    """Say where images are far from the size that the model was made for: they may take much time and memory."""
    if opened.input_shape is None:
        return
    known, shape = opened.input_shape[1:], tuple(data.train.shape)
    ratio = math.prod(shape[1:]) / math.prod(known[1:])
    if not 1 / FAR < ratio < FAR:
        terminal.warn(
            f"the images of {data.spec} are {'×'.join(map(str, shape))}, {opened.name} was made for "
            f"{'×'.join(map(str, known))}: give --resize and --crop if that is not meant"
        )


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


def example_of(shape: tuple[int, ...] | None, opened: Opened, data: Data | None) -> Tensor:
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


def about(opened: Opened, data: Data | None, example: Tensor) -> About:
    """What is known of the model beside its weights; of class names only such as there are outputs for."""
    labels = opened.labels or (data.class_names if data else None)
    known = About(labels, data.preprocessing if data else opened.preprocessing, opened.plan)
    if labels is None:
        return known
    try:
        known.check(prepared(opened.module, example, None, CheckOptions()).outputs[0])
    except ConvpareError as error:
        terminal.warn(f"the names of classes are left out: {error}")
        return replace(known, labels=None)
    return known


def _like(module: nn.Module) -> Tensor:
    """A tensor of the type and on the device that the module takes."""
    return next((p for p in module.parameters() if p.is_floating_point()), torch.zeros(1))
