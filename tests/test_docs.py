"""The Python in the README and in docs/ runs as it stands."""

import re
from pathlib import Path

import pytest

from convpare.graph import mending, rules
from convpare.importance import registry

ROOT = Path(__file__).parent.parent
PAGES = ("README.md", *(f"docs/{page}.md" for page in ("criteria", "operators", "theory", "redundancy", "kr_ablation")))


def blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.S)


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
    if page == "docs/criteria.md":
        assert "first-channels" in registry._CRITERIA


def test_every_criterion_and_command_is_documented():
    text = (ROOT / "docs/criteria.md").read_text()
    assert all(f"`{name}`" in text for name in registry._CRITERIA)
    readme = (ROOT / "README.md").read_text()
    assert all(f"convpare {name}" in readme for name in ("inspect", "compress", "evaluate", "truncate", "theory"))
