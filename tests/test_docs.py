"""The Python in the README and in docs/ runs as it stands."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import convpare
from convpare.cli import app
from convpare.graph import mending, rules
from convpare.importance import registry

ROOT = Path(__file__).parent.parent
EVERY = sorted(str(page.relative_to(ROOT)) for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
PAGES = [page for page in EVERY if "```python" in (ROOT / page).read_text()]


def blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.S)


def test_pages_with_code():
    assert {"README.md", "docs/tutorial.md", "docs/planning.md", "docs/howto/no_labels.md"} <= set(PAGES)


@pytest.mark.parametrize("page", PAGES)
def test_code_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for place, name in ((registry, "_CRITERIA"), (rules, "RULES"), (mending, "_MENDERS"), (mending, "_NUMBERS")):
        monkeypatch.setattr(place, name, dict(getattr(place, name)))
    found = blocks(page)
    assert found
    names: dict[str, object] = {}
    for block in found:
        exec(block, names)
    if page == "README.md":
        assert names["plan"].achieved["macs"] <= 0.5  # type: ignore[attr-defined]
        assert (tmp_path / "smaller" / "model.safetensors").is_file()
    if page == "docs/export.md":
        assert {path.name for path in tmp_path.iterdir()} == {"small", "small.onnx", "small.int8.onnx", "small.pt2"}
    if page == "docs/criteria.md":
        assert "first-channels" in registry._CRITERIA


def test_the_site_is_built_without_a_warning(tmp_path: Path):
    """Links, pages and docstrings: any that is broken ends the build."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    pages = {page.name for page in (tmp_path / "site").rglob("*.html")}
    assert {"index.html", "tutorial.html", "api.html", "planning.html", "budgets.html"} <= pages
    reference = (tmp_path / "site" / "api.html").read_text()
    offered = [getattr(convpare, name) for name in convpare.__all__]
    assert all(f'id="{found.__module__}.{found.__qualname__}"' in reference for found in offered)


def test_every_criterion_and_command_is_documented():
    text = (ROOT / "docs/criteria.md").read_text()
    assert all(f"`{name}`" in text for name in registry._CRITERIA)
    readme = (ROOT / "README.md").read_text()
    assert all(f"convpare {name}" in readme for name in app if not name.startswith("-"))
