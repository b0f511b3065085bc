"""A model on disk: a folder of weights (safetensors) and a record of how to rebuild it (JSON). Nothing is unpickled.

    DIR/model.safetensors   all parameters and buffers, tied ones once
    DIR/plan.json           class, spec, numbers and shapes of the model, plan, preprocessing, figures, checksums; of a
                            graph form the graph itself, so that it loads without the code that it was captured from

A folder is replaced so that a kill at any moment leaves the old artifact or the new one, complete. The new one is
written and synced in a hidden sibling, `.DIR.convpare-…`. On Linux the two are then exchanged in one step. Where the
system or the file system cannot do that, the old one is moved to `.DIR.convpare-old` first, and whoever finds no DIR
but that sibling reads the sibling. What a killed run left behind goes with a `save` an hour later; nothing but these
two files is ever deleted. Symbolic links are followed.
"""

import contextlib
import glob
import hashlib
import json
import math
import os
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors import torch as safetensors
from torch import Tensor, fx, nn
from torch.nn.parameter import is_lazy

from convpare import __version__
from convpare.apply import plan_of
from convpare.data.preprocessing import Preprocessing
from convpare.errors import ConvpareError
from convpare.factorize.edit import skeleton_
from convpare.graph import portable
from convpare.graph.mending import numbers, set_numbers
from convpare.graph.merging import merge_
from convpare.graph.sync import BATCH_NORMS, sync_attributes
from convpare.planning.plan import Plan
from convpare.replacing import exchange as _exchange
from convpare.zoo import is_builtin, load_model

SCHEMA = 1
WEIGHTS = "model.safetensors"
RECORD = "plan.json"

_RECORD_LIMIT = 16 * 2**20  # bytes; a network of a million channels needs half of it
_DIGITS_LIMIT = 100  # digits of one integer
_STALE = 3600.0  # seconds after which a temporary folder belongs to no running save

Factory = Callable[[], nn.Module]


@dataclass(frozen=True, eq=False)
class Artifact:
    """A saved model and what is known of it.

    Attributes:
        module: in evaluation mode.
        plan: how it was made smaller; its `inputs` are the shapes of the model's inputs.
        spec: what the model was built from, see `convpare.zoo.load_model`.
        preprocessing: what its images go through.
        figures: whatever was measured, plain JSON values.
        origin: what is known of the network that it was made from, and how; plain JSON values.
    """

    module: nn.Module
    plan: Plan | None
    spec: str | None
    preprocessing: Preprocessing | None
    figures: Mapping[str, Any]
    origin: Mapping[str, Any] = field(default_factory=dict)


def save(
    model: nn.Module,
    directory: str | Path,
    *,
    plan: Plan | None = None,
    spec: str | None = None,
    preprocessing: Preprocessing | None = None,
    figures: Mapping[str, Any] | None = None,
    origin: Mapping[str, Any] | None = None,
) -> Path:
    """Save a model as a folder, replacing an artifact or an empty folder of that name. Returns the folder's full path.

    The model is not changed. Parameters that are one object under several names are stored once and tied when loaded.

    Args:
        model: its class and forward are not saved, only what surgery and training change.
        directory: missing parents are made.
        plan: how the model was made smaller; None: as the one says that `apply` left with it, if there is one.
        spec: how to build the model that `plan` was applied to, so that a builtin one loads without a factory.
        preprocessing: what its images go through.
        figures: JSON values to keep with it, such as accuracies.
        origin: JSON values that say what it was made from, and how.

    Raises:
        ConvpareError: the model holds something other than plain tensors, or numbers that contradict their shapes; the
            figures or the origin are no JSON; `directory` is a file or holds anything else; or it cannot be written. In
            each case whatever was there before is left as it was.
    """
    with _reporting(f"the artifact {directory} cannot be written"):
        target = _resolved(directory)
        _check_target(target)
    weights, content = _encode(model, spec)
    plan = plan or plan_of(model)
    content["plan"] = None if plan is None else plan.to_json()
    content["preprocessing"] = None if preprocessing is None else preprocessing.to_json()
    content["figures"] = dict(figures or {})
    if origin:
        content["origin"] = dict(origin)
    record = _write_record(content)
    _read_record(f"the record of {target}", record)  # what is written can be read
    with _reporting(f"the artifact {target} cannot be written"):
        _replace(target, {WEIGHTS: weights, RECORD: record})
    return target


def check_target(directory: str | Path) -> None:
    """Find out before long work whether `save` will be allowed to write there. Leaves nothing behind.

    Raises:
        ConvpareError: `directory` is a file, holds anything but an artifact, or no folder can be made there.
    """
    target = _resolved(directory)
    with _reporting(f"the artifact {target} cannot be written"):
        _check_target(target)
        parent = next(folder for folder in target.parents if folder.exists())
        if not parent.is_dir():
            raise ConvpareError(f"{target} cannot be made, because {parent} is a file; choose another place.")
        probe = parent / f".{target.name}.convpare-{secrets.token_hex(4)}"
        probe.mkdir()
        probe.rmdir()


def load(directory: str | Path, factory: Factory | None = None) -> nn.Module:
    """The module of `load_artifact`."""
    return load_artifact(directory, factory).module


def load_artifact(directory: str | Path, factory: Factory | None = None) -> Artifact:
    """Open a folder that `save` wrote.

    Nothing that the folder names is imported or executed, except the builtin models of `convpare.zoo`.

    Args:
        directory: the folder.
        factory: builds a new, unpruned model of the class that was saved, with any weights; needed unless the artifact
            names a builtin model or holds a graph form. Its devices and `requires_grad` stay, types are as saved.

    Raises:
        ConvpareError: there is no artifact, it is damaged or was written by a newer convpare, a factory is needed, or
            the artifact does not fit the factory's model. What the factory itself raises is passed on.
    """
    with _reporting(f"the artifact {directory} cannot be read"):
        folder = _existing(_resolved(directory))
        record = _record_in(folder)
        tensors = _read_weights(folder / WEIGHTS, record)
    module = _build(record, factory, str(directory))
    try:
        if record.plan is not None and record.graph is None:
            _restructure(module, record.plan)
        _set_all_numbers(module, record)
        _fill(module, tensors, record.aliases)
        if record.graph is not None:
            for part in module.modules():
                sync_attributes(part)
        _check_shapes(module)
    except ConvpareError as error:
        raise ConvpareError(f"the artifact {directory} does not fit this {type(module).__name__}: {error}") from error
    return Artifact(module.eval(), record.plan, record.spec, record.preprocessing, record.figures, record.origin)


def read_record(directory: str | Path) -> "Record":
    """What an artifact says of itself; no model is built, and the weights are not read.

    Raises:
        ConvpareError: there is no artifact, or its record is damaged or was written by a newer convpare.
    """
    with _reporting(f"the artifact {directory} cannot be read"):
        return _record_in(_existing(_resolved(directory)))


def is_artifact(path: str | Path) -> bool:
    """Whether there is a folder with the two files of an artifact; they are not read."""
    try:
        return _has_both(_existing(_resolved(path)))
    except (OSError, ValueError):
        return False


# --------------------------------------------------------------------------------------------------- the model's state


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers by name, those that a state dict leaves out too, and tied ones under every name."""
    parameters = module.named_parameters(remove_duplicate=False)
    tensors = {**dict(parameters), **dict(module.named_buffers(remove_duplicate=False))}
    for name, tensor in tensors.items():
        if is_lazy(tensor):
            raise ConvpareError(f"{name!r} has no shape before the model's first run; run the model once.")
    return tensors


def _encode(model: nn.Module, spec: str | None) -> tuple[bytes, dict[str, Any]]:
    """The content of the weights' file, and what the record says of the model and of that file."""
    own = _tensors(model)
    extra = [name for name in model.state_dict() if name not in own]
    if extra:
        raise ConvpareError(f"the model's state has {_names(extra)}, neither parameter nor buffer: it cannot be saved.")
    _check_shapes(model)
    first: dict[int, str] = {}
    aliases = {name: first[id(x)] for name, x in own.items() if first.setdefault(id(x), name) != name}
    stored = {name: _plain(name, own[name]) for name in first.values()}
    try:
        weights = safetensors.save(stored)
    except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise ConvpareError(f"the model cannot be stored as safetensors ({type(error).__name__}: {error}).") from error
    graph = portable.to_json(model) if isinstance(model, fx.GraphModule) else None
    found = {} if graph else {name: numbers(module) for name, module in model.named_modules()}
    return weights, {
        "model": {"spec": spec, "class": type(model).__name__},
        "graph": graph,
        "numbers": {name: values for name, values in found.items() if values},
        "tensors": {name: {"shape": list(x.shape), "dtype": _dtype(x)} for name, x in stored.items()},
        "aliases": aliases,
        "size": len(weights),
        "sha256": hashlib.sha256(weights).hexdigest(),
    }


def _plain(name: str, tensor: Tensor) -> Tensor:
    if tensor.is_meta or tensor.is_quantized or tensor.layout != torch.strided:
        raise ConvpareError(
            f"{name!r} is a {'meta' if tensor.is_meta else 'quantized or sparse'} tensor; an artifact holds plain ones."
        )
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _build(record: "Record", factory: Factory | None, directory: str) -> nn.Module:
    if record.graph is not None:
        try:
            return portable.from_json(record.graph)
        except ConvpareError as error:
            raise ConvpareError(f"the artifact {directory} cannot be used: {error}.") from error
    if factory is None and (record.spec is None or not is_builtin(record.spec)):
        origin = "of an unnamed factory" if record.spec is None else f"of the factory {record.spec!r}, not run unasked"
        raise ConvpareError(
            f"the model in {directory} is a {record.kind!r} {origin}: "
            "pass factory=, a function that returns that model unpruned (on the command line --model SPEC)."
        )
    module = factory() if factory is not None else load_model(str(record.spec)).module
    kind = type(module).__name__
    if not isinstance(module, nn.Module) or kind != record.kind:
        raise ConvpareError(
            f"the model in {directory} is a {record.kind!r}, but {'the factory' if factory else record.spec} gives "
            f"a {kind!r}; pass the factory that built it (on the command line --model SPEC)."
        )
    return module


def _restructure(module: nn.Module, plan: Plan) -> None:
    """The modules as the plan's merges and factorizations leave them; the weights are those of the file."""
    for merge in plan.merges:
        try:
            merge_(module, [merge])
        except (KeyError, RuntimeError, TypeError, AttributeError) as error:
            raise ConvpareError(f"its layers do not allow for the merge of {merge.expansion!r} ({error})") from error
    skeleton_(module, plan.factorizations)


def _set_all_numbers(module: nn.Module, record: "Record") -> None:
    modules = dict(module.named_modules(remove_duplicate=False))
    for name, values in record.numbers.items():
        if name not in modules:
            raise ConvpareError(f"it has no module {name!r}; was it built with the same arguments?")
        try:
            set_numbers(modules[name], values)
        except ConvpareError as error:
            raise ConvpareError(f"module {name!r}: {error}") from error


def _fill(module: nn.Module, tensors: Mapping[str, Tensor], aliases: Mapping[str, str]) -> None:
    """Put tensors of any shape in place of the module's parameters and buffers, one object wherever they are tied."""
    own = _tensors(module)
    for problem, names in (
        ("it has no", [name for name in (*tensors, *aliases) if name not in own]),
        ("the artifact has no", [name for name in own if name not in tensors and name not in aliases]),
    ):
        if names:
            raise ConvpareError(f"{problem} {_names(names)}; was it built with the same arguments?")
    for name, old in own.items():
        _check_alike(name, old, tensors[aliases.get(name, name)], own[aliases.get(name, name)])
    placed = {name: _like(own[name], tensor) for name, tensor in tensors.items()}
    for name in own:
        owner, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(owner), leaf, placed[aliases.get(name, name)])
    for name, tensor in _tensors(module).items():
        if tensor is not placed[aliases.get(name, name)]:
            raise ConvpareError(f"{name!r} is tied to another tensor; in the artifact it is not.")


def _check_alike(name: str, old: Tensor, new: Tensor, tied: Tensor) -> None:
    same_kind = new.is_floating_point() if old.is_floating_point() else new.dtype == old.dtype
    if not same_kind or new.ndim != old.ndim or isinstance(old, nn.Parameter) != isinstance(tied, nn.Parameter):
        raise ConvpareError(
            f"{name!r} is {_dtype(new)} of shape {tuple(new.shape)} in the artifact, "
            f"{_dtype(old)} of shape {tuple(old.shape)} in the model; was it built with the same arguments?"
        )


def _like(old: Tensor, new: Tensor) -> Tensor:
    new = new if old.is_meta else new.to(old.device)
    return nn.Parameter(new, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else new


def _check_shapes(model: nn.Module) -> None:
    """Refuse a model whose layers say other numbers than the shapes of their tensors do."""
    for path, module in model.named_modules():
        for name, expected in _shapes_by_numbers(module).items():
            tensor = module._parameters.get(name, module._buffers.get(name))
            if tensor is not None and tuple(tensor.shape) != expected:
                raise ConvpareError(
                    f"{path or 'the model'!r} has {name} of shape {tuple(tensor.shape)}, but its attributes "
                    f"{numbers(module)} call for {expected}; make them agree."
                )


def _shapes_by_numbers(module: nn.Module) -> dict[str, tuple[float, ...]]:
    if isinstance(module, nn.modules.conv._ConvNd):
        first, second = module.out_channels, module.in_channels
        if module.transposed:
            first, second = second, first
        groups = module.groups if module.groups and first % module.groups == 0 else math.nan  # nan: no shape is right
        return {"weight": (first, second / groups, *module.kernel_size), "bias": (module.out_channels,)}
    if isinstance(module, nn.Linear):
        return {"weight": (module.out_features, module.in_features), "bias": (module.out_features,)}
    if isinstance(module, BATCH_NORMS):
        return dict.fromkeys(("weight", "bias", "running_mean", "running_var"), (module.num_features,))
    if isinstance(module, nn.PReLU):
        return {"weight": (module.num_parameters,)}
    return {}


# --------------------------------------------------------------------------------------------------------- the record


@dataclass(frozen=True)
class Record:
    """The content of plan.json, checked."""

    spec: str | None
    kind: str
    graph: Mapping[str, Any] | None
    numbers: Mapping[str, Mapping[str, object]]
    tensors: Mapping[str, tuple[tuple[int, ...], str]]
    aliases: Mapping[str, str]
    size: int
    sha256: str
    plan: Plan | None
    preprocessing: Preprocessing | None
    figures: Mapping[str, Any]
    origin: Mapping[str, Any]
    version: str


def _record_in(folder: Path) -> Record:
    return _read_record(str(folder / RECORD), _read(folder / RECORD, _RECORD_LIMIT + 1))


def _write_record(content: Mapping[str, Any]) -> bytes:
    record = {"schema": SCHEMA, "convpare": __version__, **content}
    try:
        record["checksum"] = _checksum(record)
        return (json.dumps(record, indent=1, allow_nan=False) + "\n").encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise ConvpareError(
            f"the plan and the figures must be plain JSON values without NaN or infinity ({error}); convert them first."
        ) from error


def _checksum(record: Mapping[str, Any]) -> str:
    """Of everything else in the record, however it is laid out."""
    rest = {key: value for key, value in record.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, allow_nan=False).encode()).hexdigest()


def _read_record(path: str, data: bytes) -> Record:
    if len(data) > _RECORD_LIMIT:
        raise ConvpareError(f"{path} has more than {_RECORD_LIMIT:,} bytes, which no artifact needs; it is damaged.")
    try:
        record = _parse(data)
        _check_version(record)
        if record.get("checksum") != _checksum(record):
            raise ConvpareError("its content and its checksum differ, so it was edited or damaged")
        return _checked(record)
    except (ValueError, RecursionError, ConvpareError) as error:
        raise ConvpareError(f"{path} cannot be used: {str(error)[:300].rstrip('.')}.") from error


def _parse(data: bytes) -> dict[str, Any]:
    record = json.loads(data.decode(), parse_int=_integer, parse_float=_finite, parse_constant=_finite)
    if not isinstance(record, dict):
        raise ConvpareError(f"it holds a {type(record).__name__}, not a JSON object")
    return record


def _integer(text: str) -> int:
    if len(text) > _DIGITS_LIMIT:
        raise ValueError(f"a number of {len(text)} digits")
    return int(text)


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is no finite number")
    return number


def _check_version(record: Mapping[str, Any]) -> None:
    schema = _get(record, "schema", int)
    if schema > SCHEMA:
        raise ConvpareError(f"written by a newer convpare (schema {schema}; this one reads {SCHEMA}): update convpare")
    if schema != SCHEMA:
        raise ConvpareError(f"there is no schema {schema}; this convpare reads {SCHEMA}")


def _checked(record: dict[str, Any]) -> Record:
    model = _get(record, "model", dict)
    plan = _get(record, "plan", dict, None)
    preprocessing = _get(record, "preprocessing", dict, None)
    tensors = _get(record, "tensors", dict)
    aliases = _get(record, "aliases", dict)
    for alias, name in aliases.items():
        if type(name) is not str or name not in tensors or alias in tensors:
            raise ConvpareError(f"{alias!r} must be another name of one of the tensors, not of {repr(name)[:60]}")
    found = _get(record, "numbers", dict)
    return Record(
        spec=_get(model, "spec", str, None),
        kind=_get(model, "class", str),
        graph=_get(record, "graph", dict, None) if "graph" in record else None,
        numbers={name: _get(found, name, dict) for name in found},
        tensors={name: _shape_and_dtype(_get(tensors, name, dict)) for name in tensors},
        aliases=aliases,
        size=_get(record, "size", int),
        sha256=_get(record, "sha256", str),
        plan=None if plan is None else Plan.from_json(plan),
        preprocessing=None if preprocessing is None else Preprocessing.from_json(preprocessing),
        figures=_get(record, "figures", dict),
        origin=_get(record, "origin", dict) if "origin" in record else {},
        version=_get(record, "convpare", str),
    )


def _shape_and_dtype(data: Mapping[str, Any]) -> tuple[tuple[int, ...], str]:
    shape = _get(data, "shape", list)
    if any(type(size) is not int for size in shape):
        raise ConvpareError(f"a shape must be a list of integers, not {repr(shape)[:60]}")
    return tuple(shape), _get(data, "dtype", str)


def _get(data: Mapping[str, Any], key: str, *kinds: type | None) -> Any:
    """The value under `key`, if it is of one of these types (bool is no int), or None where None is among them."""
    if key not in data:
        raise ConvpareError(f"it has no field {key!r}")
    value = data[key]
    if (None if value is None else type(value)) not in kinds:
        names = " or ".join("null" if kind is None else kind.__name__ for kind in kinds)
        raise ConvpareError(f"field {key!r} must be {names}, not {repr(value)[:60]}")
    return value


# ---------------------------------------------------------------------------------------------------------- the files


def _existing(target: Path) -> Path:
    """The folder to read: `target`, or the one it was when a save was killed between its two steps."""
    aside = _aside(target)
    return aside if not target.exists() and _has_both(aside) else target


def _aside(target: Path) -> Path:
    return target.parent / f".{target.name}.convpare-old"


def _has_both(folder: Path) -> bool:
    return (folder / WEIGHTS).is_file() and (folder / RECORD).is_file()


def _size(path: Path) -> int:
    if not path.is_file():
        raise ConvpareError(f"there is no file {path}; an artifact is a folder with {WEIGHTS} and {RECORD}.")
    return path.stat().st_size


def _read(path: Path, limit: int) -> bytes:
    """At most `limit` bytes, never more than there are now, so that no file makes us allocate what it claims."""
    size = _size(path)
    with path.open("rb") as file:
        return file.read(min(limit, size))


def _read_weights(path: Path, record: Record) -> dict[str, Tensor]:
    size = _size(path)
    if size != record.size:
        raise _damaged(path, "size", size, record.size)
    data = _read(path, size)
    digest = hashlib.sha256(data).hexdigest()
    if digest != record.sha256:
        raise _damaged(path, "SHA-256", digest, record.sha256)
    try:
        tensors: dict[str, Tensor] = safetensors.load(data)
    except Exception as error:  # malformed headers raise many things; nothing of them is executed
        raise ConvpareError(f"{path} is no safetensors file ({type(error).__name__}: {error}).") from error
    found = {name: (tuple(tensor.shape), _dtype(tensor)) for name, tensor in tensors.items()}
    different = [name for name in {**found, **record.tensors} if found.get(name) != record.tensors.get(name)]
    if different:
        raise ConvpareError(f"{path} and {RECORD} say different things of {_names(different)}.")
    return tensors


def _damaged(path: Path, what: str, found: object, expected: object) -> ConvpareError:
    return ConvpareError(
        f"{path} is damaged or was replaced: its {what} is {found}, {RECORD} says {str(expected)[:80]!r}. "
        "Copy the artifact again, or save it again."
    )


@contextlib.contextmanager
def _reporting(problem: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:  # a name with a null character is a ValueError
        raise ConvpareError(f"{problem}: {error}. Check the disk's free space and the permissions.") from error


def _resolved(directory: str | Path) -> Path:
    return Path(os.path.realpath(directory))


def _names(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(repr(name)[:80] for name in names[:3]) + more


# ------------------------------------------------------------------------------------------------- replacing a folder


def _check_target(target: Path) -> None:
    """Refuse whatever is not ours to replace."""
    if target.is_dir():
        others = sorted({path.name for path in target.iterdir()} - {WEIGHTS, RECORD})
        if others:
            raise ConvpareError(f"{target} holds {_names(others)}, which would be lost; choose another folder.")
        if any(target.iterdir()) and not _has_both(target):
            raise ConvpareError(f"{target} is neither empty nor an artifact; choose another folder.")
        if target.is_mount() or target == Path.cwd():
            raise ConvpareError(f"{target} cannot be replaced as a whole; name a folder inside it.")
    elif target.exists():
        raise ConvpareError(f"{target} is a file; an artifact is a folder, choose another name.")


def _replace(target: Path, files: Mapping[str, bytes]) -> None:
    """Make `target` a folder of these files, all or nothing."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with _temporary_sibling(target) as new:
        for name, content in files.items():
            with (new / name).open("xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        _sync_folder(new)
        if not target.exists():
            new.rename(target)
        elif not _exchange(new, target):
            _move_in(new, target)
        _sync_folder(target.parent)
    _remove(_aside(target))


@contextlib.contextmanager
def _temporary_sibling(target: Path) -> Iterator[Path]:
    """A new folder beside `target` that is gone afterwards, like those of runs that were killed long ago."""
    for stale in target.parent.glob(f".{glob.escape(target.name)}.convpare-*"):
        with contextlib.suppress(OSError):  # another save may remove it first
            if stale != _aside(target) and time.time() - stale.stat().st_mtime > _STALE:
                _remove(stale)
    folder = target.with_name(f".{target.name}.convpare-{secrets.token_hex(4)}")
    try:
        folder.mkdir()
        yield folder
    finally:
        _remove(folder)


def _move_in(new: Path, target: Path) -> None:
    aside = _aside(target)
    _remove(aside)
    target.rename(aside)
    try:
        new.rename(target)
    except OSError:
        aside.rename(target)
        raise


def _remove(folder: Path) -> None:
    """Delete the two files and the folder, which stays if there is anything else in it."""
    with contextlib.suppress(OSError):
        for name in (WEIGHTS, RECORD):
            (folder / name).unlink(missing_ok=True)
        folder.rmdir()


def _sync_folder(folder: Path) -> None:
    if not hasattr(os, "O_DIRECTORY"):  # Windows
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
