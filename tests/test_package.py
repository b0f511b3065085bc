"""What is published: the wheel and the source archive hold everything, and the core needs no extra."""

import importlib.metadata
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
CORE = """
import sys

sys.path[1:1] = sys.argv[1:]
import torch
from torch import nn

import convpare

assert convpare.__file__.startswith(sys.argv[1]), convpare.__file__
assert not {"cyclopts", "rich", "PIL", "plotly", "onnx", "sklearn", "timm", "accelerate"} & set(sys.modules)
torch.manual_seed(0)
model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(512, 4))
images = torch.randn(32, 3, 12, 12)
options = convpare.PlanOptions(methods=("prune", "factorize"))
plan = convpare.plan(model.eval(), images[:1], images, macs=0.5, criterion="sensitivity", options=options)
small = convpare.recover(convpare.apply(model, plan, images), teacher=model, data=images)
assert convpare.count(small, images[:1]).total == plan.after
convpare.save(small, "small", plan=plan)
print("done", plan.achieved["macs"] <= 0.5)
try:
    import convpare.cli
except SystemExit as end:
    print(end)
"""


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both archives, built as for publication."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def core_alone(folder: Path) -> Path:
    """A folder with what the core needs and what that needs, of what is installed, and nothing else."""
    folder.mkdir()
    waiting, seen = ["torch", "numpy", "scipy", "safetensors"], set[str]()
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        found = importlib.metadata.distribution(name)
        for file in found.files or ():
            top = file.parts[0]
            if top != ".." and not (folder / top).exists():
                (folder / top).symlink_to(Path(str(found.locate_file(top))))
        needed = (Requirement(text) for text in found.requires or ())
        waiting += [x.name for x in needed if x.marker is None or x.marker.evaluate({"extra": ""})]
    return folder


def test_the_wheel_holds_the_package_alone(dist: Path):
    (wheel,) = dist.glob("*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    sources = {str(path.relative_to(ROOT / "src")) for path in (ROOT / "src" / "convpare").rglob("*.py")}
    assert sources <= held
    assert {"convpare/py.typed", "convpare/report/templates/report.html"} <= held
    assert {name.partition("/")[0] for name in held} == {"convpare", "convpare-0.1.0.dist-info"}
    metadata = zipfile.ZipFile(wheel).read("convpare-0.1.0.dist-info/METADATA").decode()
    assert "License-Expression: Apache-2.0" in metadata
    assert "convpare-0.1.0.dist-info/licenses/LICENSE" in held
    needed = {line.split()[1] for line in metadata.splitlines() if "Requires-Dist" in line and "extra ==" not in line}
    assert {name.partition(">")[0] for name in needed} == {"torch", "numpy", "scipy", "safetensors"}
    (source,) = dist.glob("*.tar.gz")
    with tarfile.open(source) as archive:
        names = archive.getnames()
    assert {"convpare-0.1.0/pyproject.toml", "convpare-0.1.0/LICENSE", "convpare-0.1.0/README.md"} <= set(names)


def test_the_wheel_works_without_any_extra(dist: Path, tmp_path: Path):
    (wheel,) = dist.glob("*.whl")
    package = tmp_path / "package"
    zipfile.ZipFile(wheel).extractall(package)
    command = [sys.executable, "-I", "-S", "-c", CORE, str(package), str(core_alone(tmp_path / "core"))]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first == "done True"
    assert second.startswith("the command line needs more packages: pip install convpare[cli]")
    assert (tmp_path / "small" / "model.safetensors").is_file()
