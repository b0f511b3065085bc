"""Results of long experiments, stored as they come: a file of JSON lines that an interrupted run goes on with."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from convpare.errors import ConvpareError

Settings = Mapping[str, Any]


class PointStore:
    """What was found for each settings. With a path, every point is a line of that file as soon as it is known.

    What the file holds for other settings is left alone. A last line that an interruption cut off is dropped.

    Args:
        kind: of the experiment, such as "truncation"; the files of another kind are refused.
        is_point: whether what a line says was found makes sense.

    Raises:
        ConvpareError: the file cannot be read and written, or holds something else than points.
    """

    def __init__(
        self, path: Path | None, kind: str, is_point: Callable[[Mapping[str, Any]], bool] = lambda found: True
    ) -> None:
        self._path, self._kind, self._is_point = path, kind, is_point
        self._known: dict[str, dict[str, Any]] = {}
        if path is not None:
            self._read(path)

    def get(self, settings: Settings) -> dict[str, Any] | None:
        """What was found with these settings, or None."""
        return self._known.get(_key(settings))

    def add(self, settings: Settings, found: Mapping[str, Any]) -> dict[str, Any]:
        """Keep what was found, and give it back."""
        self._known[_key(settings)] = dict(found)
        if self._path is not None:
            line = json.dumps({self._kind: dict(settings), "found": dict(found)}, allow_nan=False)
            try:
                with self._path.open("ab") as file:
                    file.write(line.encode() + b"\n")
            except OSError as error:
                raise _unusable(self._path, error) from error
        return dict(found)

    def _read(self, path: Path) -> None:
        if path.exists() and not path.is_file():
            raise ConvpareError(f"the store is {path}, which is no ordinary file; give the name of one")
        opening = f'{{"{self._kind}": '.encode()
        try:
            with path.open("a+b") as file:
                file.seek(0)
                *lines, rest = file.read().split(b"\n")
                for number, line in enumerate(lines, 1):
                    self._parse(line, number, path)
                if not (rest.startswith(opening) or opening.startswith(rest)):
                    raise self._refused(path, len(lines) + 1)
                file.truncate(file.tell() - len(rest))
        except OSError as error:
            raise _unusable(path, error) from error

    def _parse(self, line: bytes, number: int, path: Path) -> None:
        try:
            content = json.loads(line)
            settings, found = content[self._kind], content["found"]
        except (ValueError, LookupError, TypeError, RecursionError) as cause:
            raise self._refused(path, number) from cause
        if not (isinstance(settings, dict) and isinstance(found, dict) and self._is_point(found)):
            raise self._refused(path, number)
        self._known[_key(settings)] = found

    def _refused(self, path: Path, number: int) -> ConvpareError:
        return ConvpareError(
            f"line {number} of {path} is no point of a {self._kind}; delete the line, or give another file"
        )


def _key(settings: Settings) -> str:
    return json.dumps(dict(settings), sort_keys=True)


def _unusable(path: Path, error: OSError) -> ConvpareError:
    return ConvpareError(f"the store {path} cannot be read and written: {error}; give another file")
