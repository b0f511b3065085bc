"""MODEL specs → nn.Module."""

import contextlib
import difflib
import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from convpare import blocks
from convpare.data.preprocessing import Preprocessing
from convpare.errors import ConvpareError
from convpare.optional import import_extra
from convpare.weights import load_weights

BUILTIN_PREFIXES = ("torchvision", "timm", "convpare")
MODEL_FORMS = (
    "torchvision:NAME",
    "timm:NAME",
    "convpare:NAME",
    "package.module:factory",
    "path/file.py:factory",
)

_CIFAR = Preprocessing((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_MOBILENET = Preprocessing((0.5, 0.5, 0.5), (0.5, 0.5, 0.5), resize=224, crop=224)
_DIGITS = Preprocessing((0.0,), (1.0,))


@dataclass(frozen=True, eq=False)
class ModelSource:
    """A model and what is known of its input.

    Attributes:
        module: in evaluation mode, on the CPU.
        spec: what `load_model` was given.
        input_shape: (1, channels, height, width); None if it is not known.
        preprocessing: what its training images went through; None if it is not known.
    """

    module: nn.Module
    spec: str
    input_shape: tuple[int, ...] | None = None
    preprocessing: Preprocessing | None = None


@dataclass(frozen=True)
class _Own:
    factory: Callable[..., nn.Module]
    input_shape: tuple[int, ...]
    preprocessing: Preprocessing


_OWN: dict[str, _Own] = {
    "resnet20": _Own(blocks.resnet20, (1, 3, 32, 32), _CIFAR),
    "resnet32": _Own(blocks.resnet32, (1, 3, 32, 32), _CIFAR),
    "resnet44": _Own(blocks.resnet44, (1, 3, 32, 32), _CIFAR),
    "resnet56": _Own(blocks.resnet56, (1, 3, 32, 32), _CIFAR),
    "resnet110": _Own(blocks.resnet110, (1, 3, 32, 32), _CIFAR),
    "resnet50_cifar": _Own(blocks.resnet50_cifar, (1, 3, 32, 32), _CIFAR),
    "vanilla4": _Own(blocks.vanilla4, (1, 3, 32, 32), _CIFAR),
    "mobilenet_v1_025": _Own(blocks.mobilenet_v1_025, (1, 3, 224, 224), _MOBILENET),
    "digits": _Own(blocks.digits_net, (1, 1, 8, 8), _DIGITS),
}


def is_builtin(spec: str) -> bool:
    """Whether building this spec imports only torchvision, timm or this package: an artifact may name no other."""
    prefix, colon, name = spec.partition(":")
    return bool(colon and name) and prefix in BUILTIN_PREFIXES


def load_model(spec: str, *, weights: str | Path | None = None, num_classes: int | None = None) -> ModelSource:
    """Build a model; nothing is downloaded.

    Args:
        spec: one of `MODEL_FORMS`. A factory of yours is called without arguments and must return an nn.Module.
        weights: a .safetensors, .pt or .pth file with exactly the model's names and shapes; without it the weights are
            random, or what your factory makes them.
        num_classes: outputs of the classifier, for a builtin model; None for its default.

    Raises:
        ConvpareError: the spec is of no known form or names no known model, building failed, or the weights do not fit.
    """
    if num_classes is not None and num_classes < 1:
        raise ConvpareError(f"num_classes is {num_classes}; it must be 1 or more, or None for the model's default.")
    source = _build(spec, num_classes)
    if weights is not None:
        load_weights(source.module, weights)
    source.module.eval()
    return source


def _build(spec: str, num_classes: int | None) -> ModelSource:
    prefix, _, name = spec.partition(":")
    if is_builtin(spec):
        builders = {"torchvision": _torchvision, "timm": _timm, "convpare": _own}
        return builders[prefix](spec, name, num_classes)
    place, colon, name = spec.rpartition(":")
    if not (colon and place and name.isidentifier()):
        folder = " A folder is not a model; a saved artifact is opened as one." if Path(spec).is_dir() else ""
        raise ConvpareError(
            f"model {spec!r} is of no known form.{folder} Valid forms: {', '.join(MODEL_FORMS)}; or the folder of an "
            "artifact, which is not there."
        )
    if num_classes is not None:
        raise ConvpareError(f"num_classes cannot be set for {spec!r}: a factory is called without arguments.")
    return ModelSource(_call_factory(spec, _import_place(spec, place), name), spec)


def _own(spec: str, name: str, num_classes: int | None) -> ModelSource:
    if name not in _OWN:
        raise _unknown(spec, name, _OWN)
    own = _OWN[name]
    module = own.factory() if num_classes is None else own.factory(num_classes)
    return ModelSource(module, spec, own.input_shape, own.preprocessing)


def _torchvision(spec: str, name: str, num_classes: int | None) -> ModelSource:
    models = import_extra("torchvision", "vision").models
    if name not in models.list_models():
        raise _unknown(spec, name, models.list_models())
    arguments: dict[str, Any] = {"weights": None}
    if num_classes is not None:
        arguments["num_classes"] = num_classes
    accepted = inspect.signature(models.get_model_builder(name)).parameters
    if "weights_backbone" in accepted:  # these would download their backbone's weights
        arguments["weights_backbone"] = None
    if name in ("googlenet", "inception_v3"):  # these warn unless they are told
        arguments["init_weights"] = True
    module = _built(spec, lambda: models.get_model(name, **arguments))
    return ModelSource(module, spec, *_torchvision_input(models, name))


def _torchvision_input(models: ModuleType, name: str) -> tuple[tuple[int, ...] | None, Preprocessing | None]:
    """What torchvision's own weights for this model expect; unknown for detection, video and optical flow."""
    weights = getattr(models.get_model_weights(name), "DEFAULT", None)
    if weights is None:
        return None, None
    preset: Any = weights.transforms()
    if type(preset).__name__ == "ImageClassification":
        resize, crop = preset.resize_size[0], preset.crop_size[0]
        return (1, 3, crop, crop), Preprocessing(tuple(preset.mean), tuple(preset.std), resize, crop)
    if type(preset).__name__ == "SemanticSegmentation":
        resize = preset.resize_size[0]
        return (1, 3, resize, resize), Preprocessing(tuple(preset.mean), tuple(preset.std), resize, resize)
    return None, None


def _timm(spec: str, name: str, num_classes: int | None) -> ModelSource:
    timm = import_extra("timm", "vision")
    if not timm.is_model(name):  # also keeps out names of remote hubs
        raise _unknown(spec, name, timm.list_models())
    arguments = {} if num_classes is None else {"num_classes": num_classes}
    module = _built(spec, lambda: timm.create_model(name, pretrained=False, **arguments))
    config: dict[str, Any] = getattr(module, "pretrained_cfg", {})
    if "input_size" not in config:
        return ModelSource(module, spec)
    channels, height, width = config["input_size"]
    crop = height if height == width else None
    resize = None if crop is None else int(crop / config.get("crop_pct", 1.0))
    preprocessing = Preprocessing(tuple(config["mean"]), tuple(config["std"]), resize, crop)
    return ModelSource(module, spec, (1, channels, height, width), preprocessing)


def _call_factory(spec: str, module: ModuleType, name: str) -> nn.Module:
    factory = getattr(module, name, None)
    if factory is not None and not callable(factory):
        raise ConvpareError(f"model {spec!r}: {name} is a {type(factory).__name__}; it must be a function or a class.")
    if factory is None:
        names = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise _unknown(spec, name, names)
    model = _built(spec, factory)
    if not isinstance(model, nn.Module):
        raise ConvpareError(f"the factory {spec!r} returned a {type(model).__name__}; it must return an nn.Module.")
    return model


def _built(spec: str, build: Callable[[], nn.Module]) -> nn.Module:
    try:
        return build()
    except (Exception, SystemExit) as error:  # somebody else's code, which may raise anything
        raise ConvpareError(f"building model {spec!r} failed: {type(error).__name__}: {error}") from error


def _import_place(spec: str, place: str) -> ModuleType:
    if place.endswith(".py"):
        path = Path(place).resolve()
        if not path.is_file():
            raise ConvpareError(f"model {spec!r}: the file {place} does not exist.")
        with _importing(spec, path.parent):
            return _import_file(path)
    if not all(part.isidentifier() for part in place.split(".")):
        raise ConvpareError(
            f"model {spec!r}: {place!r} is neither a module's dotted name nor a .py file. "
            f"Valid forms: {', '.join(MODEL_FORMS)}."
        )
    with _importing(spec, Path.cwd()):
        return importlib.import_module(place)


@contextlib.contextmanager
def _importing(spec: str, folder: Path) -> Iterator[None]:
    """Let the user's code import its neighbours, and say what went wrong in it."""
    sys.path.insert(0, str(folder))
    try:
        yield
    except (Exception, SystemExit) as error:  # somebody else's code, which may raise anything
        near = difflib.get_close_matches(spec.partition(":")[0], BUILTIN_PREFIXES, 1)
        hint = f" Did you mean {near[0]}:...?" if near else ""
        raise ConvpareError(f"model {spec!r} cannot be imported: {type(error).__name__}: {error}.{hint}") from error
    finally:
        if str(folder) in sys.path:
            sys.path.remove(str(folder))


def _import_file(path: Path) -> ModuleType:
    name = f"convpare_user_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _unknown(spec: str, name: str, known: Iterable[str]) -> ConvpareError:
    names = sorted(known)
    near = difflib.get_close_matches(name, names, 5, cutoff=0.5)
    hint = (
        f"Did you mean {', '.join(near)}?" if near else f"Known: {', '.join(names[:10])}{', ...' * (len(names) > 10)}."
    )
    return ConvpareError(f"model {spec!r}: there is no {name!r}. {hint}")
