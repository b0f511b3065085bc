"""A network that is compressed by the commands, as a user does it, and a browser to look at its report."""

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from playwright.sync_api import Browser, sync_playwright
from safetensors.torch import save_file

from convpare import cli
from convpare.blocks.digits import train_digits

BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@dataclass(frozen=True)
class Made:
    """Where everything is: weights, artifact, sweep and report."""

    folder: Path

    @property
    def model(self) -> list[str]:
        """Arguments that name the original network and its images."""
        return ["convpare:digits", "--weights", str(self.folder / "digits.safetensors"), "--data", "digits"]

    @property
    def artifact(self) -> Path:
        return self.folder / "small"

    @property
    def page(self) -> Path:
        return self.folder / "small.html"

    def run(self, *arguments: object) -> int:
        """The exit code of a command."""
        with pytest.raises(SystemExit) as ended:
            cli.main([str(argument) for argument in arguments])
        assert isinstance(ended.value.code, int)
        return ended.value.code


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A trained network for digits at half of its MACs with the report of it, all by commands."""
    folder = tmp_path_factory.mktemp("report")
    model, _ = train_digits(epochs=6)
    save_file(model.state_dict(), folder / "digits.safetensors")
    found = Made(folder)
    sweep = folder / "sweep.json"
    assert found.run("compress", *found.model, "--macs", 0.5, "-o", found.artifact) == 0
    assert found.run("plan", *found.model, "--macs", 0.3, "--sweep", "--json", sweep) == 0
    shown = ("--data", "digits", "--sweep", sweep, "--json", folder / "page.json")
    assert found.run("report", found.artifact, *shown, "-o", found.page) == 0
    return found


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """The system's Chromium; tests that need it fail where there is none."""
    path = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.fail("no Chromium to open reports in: apt-get install chromium, or name one in CHROMIUM")
    with sync_playwright() as play:
        opened = play.chromium.launch(executable_path=path)
        yield opened
        opened.close()
