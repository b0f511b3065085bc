"""What all tests share."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

_torchvision: torch.library.Library | None = None
try:
    import torchvision  # noqa: F401
except ImportError:
    pass
except RuntimeError:
    # A torchvision built for another torch cannot load its compiled operators and then fails to register shapes for
    # these two. Its models need neither. The library lives as long as this variable.
    _torchvision = torch.library.Library("torchvision", "DEF")
    _torchvision.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _torchvision.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data and weights. Tests that want it are skipped where CONVPARE_SHARED does not name it."""
    place = os.environ.get("CONVPARE_SHARED")
    if not place:
        reason = "CONVPARE_SHARED does not name the folder of real data and weights"
        if os.environ.get("CONVPARE_REQUIRE_SHARED"):
            pytest.fail(reason)
        pytest.skip(reason)
    if not Path(place).is_dir():
        pytest.fail(f"CONVPARE_SHARED names {place}, which is no folder")
    return Path(place)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--overwrite", action="store_true", help="write the files in tests/golden anew")


LONGEST = ("test_real.py", "zoo/test_zoo.py", "test_cli.py", "recovery/test_processes.py", "graph/test_property.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take longest come first, so that no worker is left with one when the others are done."""
    tests = Path(__file__).parent
    place = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.relative_to(tests).as_posix(), len(LONGEST)))


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """Compare a text with the file of that name in tests/golden, or write it there with --overwrite."""

    def check(name: str, text: str) -> None:
        path = Path(__file__).parent / "golden" / name
        if request.config.getoption("--overwrite"):
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
        assert text == path.read_text()

    return check
