"""What commands store and show of how a result came about, and where a report finds the original network."""

import hashlib
import json
import platform
import shlex
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from convpare import __version__, terminal
from convpare.apply import example_inputs, graph_for, merged_for
from convpare.artifact import Record
from convpare.cli.arguments import DataArguments, ModelArguments
from convpare.cli.models import Opened, open_data, open_model
from convpare.data import Data
from convpare.errors import ConvpareError
from convpare.inspection import inspect
from convpare.planning.plan import Plan
from convpare.planning.planner import calibration_images
from convpare.report import Facts, Network, Pair, gallery, network_of
from convpare.zoo import is_builtin

arguments: ContextVar[tuple[str, ...]] = ContextVar("arguments", default=())
"""Of the command that runs."""

_SWEEP_LIMIT = 64 * 2**20  # bytes


def command_line() -> str:
    """The command that runs, as it can be given again."""
    return shlex.join(["convpare", *arguments.get()])


def origin_of(opened: Opened, example: Tensor, plan: Plan, data: Data | None, tell: terminal.Tell) -> dict[str, Any]:
    """What an artifact keeps of the network that it was made from, and how."""
    origin: dict[str, Any] = {"commands": [command_line()], "num_classes": opened.num_classes}
    if data is not None:
        origin["images"] = f"{data.spec}: {data.note}"
    if opened.weights is not None:
        origin["weights"] = {"file": str(opened.weights), "sha256": _digest(opened.weights)}
    try:
        found = inspect(opened.module, example, form=plan.form, on_progress=tell)
        merged = graph_for(merged_for(opened.module, plan), plan) if plan.merges else None
        origin["network"] = network_of(found, plan, merged).to_json()
    except ConvpareError as error:  # the artifact matters more
        terminal.warn(f"a report of this artifact will lack its layers: {error}")
    return origin


def of_original(
    record: Record, teacher: str | None, which: ModelArguments, data: DataArguments, images: int, tell: terminal.Tell
) -> tuple[Network | None, tuple[Pair, ...]]:
    """What the original network and images add to a report: the layers anew, and pictures of feature maps."""
    if which.model is not None:
        raise ConvpareError("--model is for what loads the artifact itself; name the original with --teacher")
    if teacher is None and (which.weights is not None or which.num_classes is not None):
        raise ConvpareError("--weights and --num-classes are of the original: name it with --teacher")
    plan = record.plan
    if plan is None or (teacher is None and data.data is None):
        return None, ()
    opened = open_model(teacher, which, tell) if teacher is not None else _known(record, tell)
    shown = open_data(data, opened, tell)
    subject = merged_for(opened.module, plan)
    plan = plan.made_true(graph_for(subject, plan))
    inputs = example_inputs(subject, plan)
    seen = inspect(subject, inputs, shown, images=images, form=plan.form, on_progress=tell)
    if subject is opened.module:
        network = network_of(seen, plan)
    else:
        network = network_of(inspect(opened.module, inputs, form=plan.form, on_progress=tell), plan, seen.graph)
    if (maps_of := calibration_images(shown, images, 0)) is None:
        return network, ()
    return network, gallery(subject, seen, maps_of, plan, lambda done, total: tell("drawing feature maps", done, total))


def _known(record: Record, tell: terminal.Tell) -> Opened:
    """The original, where the record says which builtin model it was and its weights are still where they were."""
    weights, classes = record.origin.get("weights"), record.origin.get("num_classes")
    found = weights if isinstance(weights, dict) else {}
    file = Path(str(found.get("file", "")))
    known = record.spec is not None and is_builtin(record.spec) and file.is_file()
    if not known or _digest(file) != found.get("sha256"):
        raise ConvpareError(
            "pictures of feature maps need the original network, which the artifact does not hold: name it with "
            "--teacher MODEL and its --weights, as it was given to compress"
        )
    return open_model(str(record.spec), ModelArguments(file, classes if type(classes) is int else None), tell)


def _digest(file: Path) -> str:
    try:
        with file.open("rb") as content:
            return hashlib.file_digest(content, "sha256").hexdigest()
    except OSError as error:
        raise ConvpareError(f"{file} cannot be read: {error}") from error


def read_sweep(path: Path | None) -> object:
    """A file that `convpare plan --sweep --json` wrote; None without a path."""
    if path is None:
        return None
    try:
        if path.stat().st_size > _SWEEP_LIMIT:
            raise ConvpareError(f"--sweep is {path}, which has more than {_SWEEP_LIMIT:,} bytes; it is no sweep")
        return json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ConvpareError(f"--sweep is {path}, which cannot be read as JSON: {error}") from error


def facts(opened: Opened, data: Data | None) -> Facts:
    """How a result came about that is of a network as it is."""
    weights = "random" if opened.random else "its own" if opened.weights is None else str(opened.weights)
    return (
        ("Command", command_line()), ("Model", opened.name), ("Weights", weights),
        *([] if data is None else [("Images", f"{data.spec}: {data.note}")]),
        ("Versions", f"convpare {__version__}, torch {torch.__version__}, Python {platform.python_version()}"),
    )  # fmt: skip


def recovered_origin(origin: Any) -> dict[str, Any]:
    """The origin of an artifact that was recovered since."""
    before = origin.get("commands")
    return {**origin, "commands": [*(before if isinstance(before, list) else []), command_line()]}
