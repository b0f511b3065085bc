"""Files that commands write: checked before long work, and written whole or not at all."""

import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from convpare import artifact
from convpare.artifact import is_artifact
from convpare.errors import ConvpareError
from convpare.export import Destination
from convpare.export.folder import FILES
from convpare.optional import import_extra
from convpare.replacing import check_folder
from convpare.report import DOCTYPE

OPENINGS = {"onnx": b"\x08", "pt2": b"PK"}
"""The first bytes of files that an export may replace: a protobuf's first field, and a zip archive."""


def check_output(output: Path) -> None:
    if not output.name and str(output) in ("", "."):
        raise ConvpareError("-o names the current folder; an artifact is a folder of its own, such as -o smaller")
    artifact.check_target(output)


def check_json(path: Path | None, output: Path | None = None, option: str = "--json") -> None:
    """Find out before long work whether the file can be written, and whether anything would be lost."""
    _check_file(path, option, b"{", output)


def check_plot(path: Path | None) -> None:
    """The same of a figure's file, and whether figures can be made."""
    if path is not None:
        import_extra("plotly.subplots", "report")
    _check_file(path, "--plot", DOCTYPE.encode())


def check_report(path: Path | None, option: str = "--report") -> None:
    """The same of a report's file, and whether reports can be made."""
    if path is not None:
        import_extra("jinja2", "report")
    _check_file(path, option, DOCTYPE.encode())


def check_gallery(folder: Path | None, data: str | None) -> None:
    """Find out before long work whether pictures can be made and written into the folder, which is made if need be."""
    if folder is None:
        return
    if data is None:
        raise ConvpareError("--gallery shows feature maps and needs images: give --data")
    import_extra("PIL.Image", "cli")
    if is_artifact(folder):
        raise ConvpareError(f"--gallery is {folder}, an artifact, which holds nothing else; choose another folder")
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise ConvpareError(f"--gallery is {folder}, which is no folder that can be made: {error}") from error


def check_destination(destination: Destination) -> None:
    """The same of what an export writes, and whether it can be made at all."""
    name, path = f"--{destination.kind}", destination.path
    if destination.kind == "torch":
        if is_artifact(Path(os.path.realpath(path)).parent):
            raise ConvpareError(f"{name} is {path}, inside an artifact, which holds nothing else; choose another place")
        check_folder(path, FILES)
        return
    if destination.kind == "onnx":
        for module in ("onnx", "onnxscript", "onnxruntime"):
            import_extra(module, "onnx")
    if destination.kind == "pt2" and path.suffix != ".pt2":
        raise ConvpareError(f"{name} is {path}; expected a name that ends in .pt2, by which torch knows such files")
    for place in (path, destination.int8_path) if destination.int8 else (path,):
        _check_file(place, name, OPENINGS[destination.kind])


def _check_file(path: Path | None, option: str, opening: bytes, output: Path | None = None) -> None:
    if path is None:
        return
    place = Path(os.path.realpath(path))
    inside = output is not None and place.is_relative_to(os.path.realpath(output))
    if place.is_dir():
        raise ConvpareError(f"{option} is {path}, a folder; give the name of a file")
    if inside or is_artifact(place.parent):
        raise ConvpareError(f"{option} is {path}, inside an artifact, which holds nothing else; choose another place")
    if not place.parent.is_dir():
        raise ConvpareError(
            f"{option} is {path}, but there is no folder {path.parent}; make it, or choose another place"
        )
    try:
        if place.exists() and not place.is_file():
            raise ConvpareError(f"{option} is {path}, which is no ordinary file; give the name of one")
        if place.exists() and not _is_replaceable(place, opening):
            raise ConvpareError(f"{option} is {path}, which is there and holds something else; choose another name")
        with _beside(place) as temporary:
            temporary.touch(exist_ok=False)
    except OSError as error:
        raise ConvpareError(f"{option} is {path}, which cannot be written: {error}") from error


def _is_replaceable(place: Path, opening: bytes) -> bool:
    """Whether a file is empty or looks like what the option writes."""
    with place.open("rb") as file:
        start = file.read(64).lstrip()
    return not start or start.startswith(opening)


@contextmanager
def _beside(place: Path) -> Iterator[Path]:
    """A name for a temporary file in the same folder, which is gone afterwards."""
    temporary = place.with_name(f".convpare-{secrets.token_hex(4)}.json")
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path | None, content: dict[str, Any]) -> None:
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
