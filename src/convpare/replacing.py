"""Files and folders that are written beside under a temporary name and then moved: whole, or as they were before."""

import ctypes
import os
import secrets
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from convpare.errors import ConvpareError


@contextmanager
def replaced_file(path: Path) -> Iterator[Path]:
    """A temporary name in the same folder; the file written there takes the place of `path` if the block ends well.

    Raises:
        ConvpareError: `path` is a folder, there is no folder that it could stand in, or it cannot be written.
    """
    place = Path(os.path.realpath(path))
    if place.is_dir():
        raise ConvpareError(f"{path} is a folder; give the name of a file")
    if not place.parent.is_dir():
        raise ConvpareError(f"{path} cannot be written: there is no folder {path.parent}; make it first")
    temporary = _beside(place)
    try:
        with _reporting(path):
            temporary.touch(exist_ok=False)
            yield temporary
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, place)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def replaced_folder(path: Path, names: frozenset[str]) -> Iterator[Path]:
    """The same of a folder that holds files of these names alone.

    Raises:
        ConvpareError: `path` is a file, holds anything else, or cannot be written.
    """
    check_folder(path, names)
    place = Path(os.path.realpath(path))
    temporary, aside = _beside(place), _beside(place)
    try:
        with _reporting(path):
            temporary.mkdir()
            yield temporary
            check_folder(path, names)  # meanwhile, something may have come
            if not place.exists():
                temporary.rename(place)
            elif not exchange(temporary, place):
                place.rename(aside)
                temporary.rename(place)
    except BaseException:
        if aside.exists() and not place.exists():
            aside.rename(place)
        raise
    finally:
        for folder in (temporary, aside):
            shutil.rmtree(folder, ignore_errors=True)


def check_folder(path: Path, names: frozenset[str]) -> None:
    """Find out before long work whether a folder of files of these names can be written there. Leaves nothing behind.

    Raises:
        ConvpareError: as `replaced_folder`.
    """
    place = Path(os.path.realpath(path))
    if place.exists() and not place.is_dir():
        raise ConvpareError(f"{path} is a file; give the name of a folder")
    if not place.parent.is_dir():
        raise ConvpareError(f"{path} cannot be written: there is no folder {path.parent}; make it first")
    with _reporting(path):
        others = sorted({file.name for file in place.iterdir()} - names - {"__pycache__"}) if place.exists() else []
        if others:
            raise ConvpareError(f"{path} holds {', '.join(map(repr, others[:3]))}, which would be lost; choose another")
        if place.is_mount() or place == Path.cwd():
            raise ConvpareError(f"{path} cannot be replaced as a whole; name a folder inside it")
        probe = _beside(place)
        probe.mkdir()
        probe.rmdir()


def exchange(a: Path, b: Path) -> bool:
    """Swap two folders in one step; False where this cannot be done."""
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform == "linux" else None
    if renameat2 is None:
        return False
    here, swap = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return bool(renameat2(here, os.fsencode(a), here, os.fsencode(b), swap) == 0)


def _beside(place: Path) -> Path:
    return place.with_name(f".{place.stem}.convpare-{secrets.token_hex(4)}{place.suffix}")


@contextmanager
def _reporting(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConvpareError(f"{path} cannot be written: {error}. Check the disk and the permissions.") from error
