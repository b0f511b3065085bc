"""The command line as a hostile and clumsy user meets it."""

import dataclasses
import functools
import io
import json
import os
import pickle
import pty
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import save_file

from convpare import artifact, cli, measurement, terminal
from convpare.artifact import load_artifact
from convpare.blocks.digits import digits_net
from convpare.importance import criteria
from convpare.importance.qsfm import QSFMOptions
from convpare.jsonable import finite
from convpare.planning.settings import ALLOCATIONS, SCOPES
from convpare.recovery import training
from convpare.recovery.calibrate import METHODS
from convpare.timing import side_by_side

NETS = """
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(1, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.b = nn.Conv2d(16, 16, 3, padding=1)
        self.fc = nn.Linear(16, 10)

    def forward(self, x):
        x = torch.relu(self.b(torch.relu(self.norm(self.a(x)))))
        return self.fc(x.mean((2, 3)))


class Branch(Net):
    def forward(self, x):
        y = super().forward(x)
        return y if y.sum() > 0 else -y


class Written(Net):
    def forward(self, x):
        x = self.norm(self.a(x)).view(len(x), 2, 8, 8, 8).flatten(1, 2)
        return self.fc(torch.cat([x[:, :6], self.b(x)[:, :10]], 1).mean((2, 3)))


class Layered(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.norm = nn.Conv2d(1, 16, 3), nn.LayerNorm(16)
        self.b, self.fc = nn.Conv2d(16, 8, 3), nn.Linear(8, 10)

    def forward(self, x):
        x = self.norm(self.a(x).movedim(1, -1)).movedim(-1, 1)
        return self.fc(self.b(x).flatten(2).amax(2))


class Bare(nn.Module):
    def __init__(self):
        super().__init__()
        self.kernel = nn.Parameter(torch.ones(4, 1, 3, 3))

    def forward(self, x):
        y = F.conv2d(x, self.kernel)
        return y if y.sum() > 0 else -y


class Flat(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.fc = nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8 * 16, 10)

    def forward(self, x):
        return self.fc(self.b(self.a(x)).flatten(1))


class Dense(Net):
    def forward(self, x):
        return self.b(self.a(x))


class Broken(Net):
    def forward(self, x):
        return super().forward(x) * float("nan")


class Sleepy(Net):
    def forward(self, x):
        if x.shape[0] > 100:
            Path("asleep").touch()
            time.sleep(60)
        return super().forward(x)


def make():
    torch.manual_seed(0)
    return Net()


def with_nan():
    net = Net()
    net.fc.weight.data[0, 0] = float("nan")
    return net


def fails():
    raise RuntimeError("boom in the factory")


def leaves():
    sys.exit(3)


def nothing():
    pass


def takes_one(argument):
    return Net()


number = 3
"""


class Evil:
    """Pickled, it leaves a file where it is loaded."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("executed",)


@dataclasses.dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str


Run = Callable[[str], Result]


def tree(place: Path) -> dict[str, tuple[int, int] | None]:
    """Every file with its size and time of change: what a failed command must leave as it was."""
    return {
        str(path.relative_to(place)): (path.stat().st_size, path.stat().st_mtime_ns) if path.is_file() else None
        for path in place.rglob("*")
    }


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of models, images and rubbish."""
    place = tmp_path_factory.mktemp("cli")
    rng = np.random.default_rng(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        weights = digits_net().state_dict()
    save_file(weights, place / "digits.safetensors")
    save_file({**weights, "fc.bias": weights["fc.bias"] * float("nan")}, place / "nan.safetensors")
    for name in ("evil.pt", "evil.safetensors", "evil.pkl"):
        (place / name).write_bytes(pickle.dumps(Evil()))
    torch.save({"fc.bias": Evil()}, place / "evil_zip.pt")
    (place / "net.py").write_text(NETS)
    (place / "syntax.py").write_text("def make(:\n")
    (place / "raises.py").write_text("raise RuntimeError('boom at import')\n")
    (place / "leaves.py").write_text("import sys\nsys.exit(3)\n")
    pixels, labels = rng.integers(0, 256, (60, 8, 8), dtype=np.uint8), np.arange(60) % 10
    np.savez(place / "grey.npz", images=pixels, labels=labels)
    np.savez(place / "unlabelled.npz", images=pixels)
    np.savez(place / "small.npz", images=pixels[:, :6, :6])
    np.savez(place / "rgb.npz", images=rng.integers(0, 256, (60, 8, 8, 3), dtype=np.uint8), labels=labels)
    np.savez(place / "beyond.npz", images=pixels, labels=labels + 7)
    np.savez(place / "negative.npz", images=pixels, labels=labels - 1)
    np.savez(place / "objects.npz", images=np.array([{}], dtype=object))
    np.savez(place / "one.npz", images=pixels[:1])
    (place / "text.npz").write_text("no archive")
    for name in ("photos", "classes/cat", "classes/dog"):
        (place / name).mkdir(parents=True)
        for i in range(8):
            image = Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8))
            image.save(place / name / f"{i}.{'jpg' if name == 'photos' else 'png'}")
    (place / "classes/cat/text.png").write_text("no image")
    whole = (place / "photos/0.jpg").read_bytes()
    (place / "photos/cut.jpg").write_bytes(whole[: len(whole) * 2 // 3])
    (place / "empty").mkdir()
    (place / "thesis").mkdir()
    (place / "thesis/thesis.tex").write_text("years of work")
    (place / "file").write_text("a file")
    return place


@pytest.fixture
def run(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Run]:
    """Call the command line in this process, in a folder of models and images, with short measurements of time."""
    monkeypatch.chdir(place)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.setattr(measurement, "side_by_side", functools.partial(side_by_side, seconds=0.0))
    for name in ("COLUMNS", "NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)

    def run(line: str) -> Result:
        code: object = 0
        try:
            cli.main(shlex.split(line))
        except SystemExit as end:
            code = end.code or 0
        captured = capsys.readouterr()
        assert isinstance(code, int), code
        return Result(code, captured.out, captured.err)

    yield run
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def made(place: Path) -> Path:
    """An artifact of convpare:digits; tests must not change it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measurement, "side_by_side", functools.partial(side_by_side, seconds=0.0))
        patch.chdir(place)
        with pytest.raises(SystemExit) as end:
            cli.main(["compress", *shlex.split(f"{DIGITS} --data digits --macs 0.5 --images 64 -o made")])
    assert not end.value.code
    return place / "made"


DIGITS = "convpare:digits --weights digits.safetensors"
COMPRESS = f"compress {DIGITS} --data digits -o new"
NO_IMAGES = "--recover none --criterion l2"


# ------------------------------------------------------------------------------------------------------ what goes wrong

WRONG_OPTIONS = {
    "inspect": "MODEL requires an argument",
    "inspect convpare:digits --frob": "Unknown option: --frob",
    "inspect convpare:digits extra": "extra",
    "explain convpare:digits": "Unknown command .*: inspect, compress, plan, apply, recover, evaluate, export, bench",
    "compress convpare:digits --data digits --macs 0.5": "--output requires an argument",
    f"{COMPRESS}": "how much shall go.*--macs, --params, --memory or --latency",
    f"{COMPRESS} --macs 0": r"macs budget is 0\.0; expected a fraction .* above 0 and at most 1",
    f"{COMPRESS} --macs 1.5": r"macs budget is 1\.5",
    f"{COMPRESS} --macs -1": r"macs budget is -1\.0",
    f"{COMPRESS} --params nan": "params budget is nan",
    f"{COMPRESS} --macs abc": r'--macs: unable to convert "abc" into float',
    f"{COMPRESS} --latency 2": r"latency budget is 2\.0; expected a fraction",
    f"{COMPRESS} --macs 0.5 --runtime eager": "--runtime says where time is measured; give it with --latency",
    f"{COMPRESS} --macs 0.5 --batch 4": "--batch says where time is measured",
    f"{COMPRESS} --latency 0.5 --runtime tensorrt": '"tensorrt" for --runtime.*"onnxruntime"',
    f"{COMPRESS} --latency 0.5 --threads 0": '"0" for --threads. Must be >= 1',
    f"{COMPRESS} --macs 0.5 --threshold 0.1": "--threshold takes the place of a budget",
    f"{COMPRESS} --threshold nan": "--threshold is nan; expected a finite number",
    f"{COMPRESS} --threshold -1": r"--threshold is -1\.0",
    f"{COMPRESS} --macs 0.5 --criterion qsfm": "no criterion 'qsfm'; choose one of .*qsfm-ssim",
    f"{COMPRESS} --macs 0.5 --methods x": "methods are .*'x'.*; expected prune, factorize, or both",
    f"{COMPRESS} --macs 0.5 --methods ,": "expected prune, factorize, or both",
    f"{COMPRESS} --macs 0.5 --methods factorize": "criterion qsfm-ssim .* take reconstruction or sensitivity",
    f"{COMPRESS} --macs 0.5 --methods factorize --rounds 2": "give no threshold and no rounds",
    f"{COMPRESS} --macs 0.5 --scope x": '"x" for --scope.*"inner"',
    f"{COMPRESS} --macs 0.5 --allocation x": '"x" for --allocation.*"uniform"',
    f"{COMPRESS} --macs 0.5 --tap x": '"x" for --tap.*"activation"',
    f"{COMPRESS} --macs 0.5 --window x": '"x" for --window.*"gaussian"',
    f"{COMPRESS} --macs 0.5 --rule x": '"x" for --rule.*"pair"',
    f"{COMPRESS} --macs 0.5 --who x": '"x" for --who.*"norm"',
    f"{COMPRESS} --macs 0.5 --who norm --rule mean": "--who norm chooses within pairs; with --rule mean",
    f"{COMPRESS} --macs 0.5 --recover x": '"x" for --recover.*"batch-norm"',
    f"{COMPRESS} --macs 0.5 --data-range x": "--data-range is 'x'; expected layer, image, or a number above 0",
    f"{COMPRESS} --macs 0.5 --data-range -1": "--data-range is '-1'",
    f"{COMPRESS} --macs 0.5 --criterion l2 --tap conv": "--tap is an option of qsfm-ssim .* criterion l2 has none",
    f"{COMPRESS} --macs 0.5 --round-to 0": '"0" for --round-to. Must be >= 1',
    f"{COMPRESS} --macs 0.5 --rounds 0": "--rounds",
    f"{COMPRESS} --macs 0.5 --images 0": "--images",
    f"{COMPRESS} --macs 0.5 --samples 0": "--samples",
    f"{COMPRESS} --macs 0.5 --limit 0": "--limit",
    f"{COMPRESS} --macs 0.5 --seed -1": "--seed",
    f"{COMPRESS} --macs 0.5 --recover-images 1": r"1 image\(s\); at least",
    f"compress {DIGITS} --macs 0.5 -o new": "qsfm-ssim looks at feature maps: give images with --data",
    f"{COMPRESS} --macs 0.5 --epochs 3": "--epochs is about training: give it with --recover distill or finetune",
    f"{COMPRESS} --macs 0.5 --recover distill --epochs 3 --minutes 1": "give epochs or minutes, not both",
    f"{COMPRESS} --macs 0.5 --recover distill --minutes 0": "minutes is 0.0; expected a number above 0",
    f"{COMPRESS} --macs 0.5 --recover finetune --lr 0": "lr is 0.0",
    f"recover made --teacher {DIGITS} -o new": "recover needs images, and a way: give --data",
    f"recover made --teacher {DIGITS} --data digits --recover none -o new": "and no --recover none",
    f"recover nothing --teacher {DIGITS} --data digits -o new": "there is no file .*plan.json",
    f"compress {DIGITS} --macs 0.5 --criterion l2 -o new": "recovery needs images: give --data, or --recover none",
    f"compress {DIGITS} --macs 0.5 {NO_IMAGES} --crop 8 -o new": "--crop is about images; say with --data which ones",
    f"compress {DIGITS} --macs 0.5 {NO_IMAGES} --test digits -o new": "--test is about images",
    f"plan {DIGITS} --data digits": "how much shall go",
    f"plan {DIGITS} --macs 0.5": "qsfm-ssim looks at feature maps: give images with --data",
    f"plan {DIGITS} --criterion l2 --threshold 0.1 --sweep": "--sweep goes from the dense network to a budget",
    f"plan {DIGITS} --criterion l2 --macs 0.5 --sweep -o p.json": "--sweep makes many plans; give it without --output",
    f"plan {DIGITS} --criterion l2 --macs 0.5 --plot p.html": "--plot draws the trade-off; give it with --sweep",
    f"apply {DIGITS}": "PLAN requires an argument",
    f"apply {DIGITS} plan.json": "--output requires an argument",
    f"apply {DIGITS} plan.json -o new": "recovery needs images: give --data, or --recover none",
    f"apply {DIGITS} plan.json --recover none -o new": "no plan at plan.json",
    f"apply {DIGITS} file --recover none -o new": "file is not a plan: it cannot be read as JSON",
    "export": "MODEL requires an argument",
    f"export {DIGITS}": "what shall be written.*--onnx F.onnx, --pt2 F.pt2 and --torch FOLDER",
    f"export {DIGITS} --onnx a.onnx --pt2 a.pt2": "what shall be written.*Give one of",
    f"export {DIGITS} --onnx a.onnx --torch a": "what shall be written.*Give one of",
    f"export {DIGITS} --pt2 a.pt2 --int8 --data digits": "int8 is a second ONNX file; give it with onnx",
    f"export {DIGITS} --int8 --data digits": "what shall be written",
    f"export {DIGITS} --onnx a.onnx --int8": "--int8 takes the ranges of activations from images: give --data",
    f"export {DIGITS} --onnx a.onnx --tolerance 0": r"tolerance is 0\.0; expected a number above 0",
    f"export {DIGITS} --onnx a.onnx --tolerance x": '"x" into float',
    f"export {DIGITS} --onnx a.onnx --limit 3": "--limit is about images; say with --data which ones",
    "bench": "bench times networks: give MODEL",
    "bench convpare:digits --runtimes tensorrt": "no runtime 'tensorrt'; choose one of eager, compile, onnxruntime",
    "bench convpare:digits --batches 0": "--batches is '0'; expected whole numbers above 0",
    "bench convpare:digits --threads x": "--threads is 'x'; expected whole numbers above 0",
    "bench convpare:digits --seconds -1": r"seconds is -1\.0",
    "evaluate convpare:digits": "evaluate needs labelled images: give --data",
    "inspect convpare:digits --num-classes 0": '"0" for --num-classes',
}

WRONG_MODELS = {
    'inspect ""': "MODEL is empty",
    "inspect digits": "of no known form.*convpare:NAME.*the folder of an artifact",
    "inspect nowhere/": "of no known form",
    "inspect convpare:digitz": "Did you mean digits",
    "inspect conpvare:digits": r"Did you mean convpare:",
    "inspect convpare:digits --weights none.safetensors": "none.safetensors do not exist",
    "inspect convpare:digits --weights photos": "photos do not exist or are no file",
    "inspect convpare:digits --weights nan.safetensors": "nan.safetensors: fc.bias holds NaN",
    "inspect convpare:resnet20 --weights digits.safetensors": "do not fit CifarResNet.*missing.*unexpected",
    "inspect convpare:digits --weights evil.pt": r"hold more than weights \((?!Weights only).*never executed",
    "inspect convpare:digits --weights evil_zip.pt": "unsupported GLOBAL .*mkdir.*never executed",
    "inspect convpare:digits --weights evil.safetensors": "no safetensors file",
    "inspect convpare:digits --weights evil.pkl": r"expected \.safetensors, \.pt or \.pth",
    "inspect convpare:digits --model net.py:make": "--model says what an artifact was made from",
    "inspect net.py": "of no known form.*path/file.py:factory",
    "inspect nowhere.py:make": "nowhere.py does not exist",
    "inspect syntax.py:make": r"SyntaxError: invalid syntax \(syntax.py, line 1\)",
    "inspect raises.py:make": "RuntimeError: boom at import",
    "inspect leaves.py:make": "cannot be imported: SystemExit: 3",
    "inspect net.py:fails": "RuntimeError: boom in the factory",
    "inspect net.py:leaves": "building model .* failed: SystemExit: 3",
    "inspect net.py:nothing": "returned a NoneType; it must return an nn.Module",
    "inspect net.py:takes_one": "missing 1 required positional argument",
    "inspect net.py:mak": "there is no 'mak'. Did you mean make",
    "inspect net.py:number": "number is a int; it must be a function or a class",
    "inspect net.py:make": "shape of the model's input is not known: give --input",
    "inspect net.py:with_nan --input 1,1,8,8": "'fc.weight' of net.py:with_nan holds NaN",
    "inspect net.py:Bare --input 1,1,8,8": "Bare runs on inputs .* but torch.export cannot capture it.*submodules",
    "compress net.py:Bare --data digits --macs 0.5 -o new": "torch.export cannot capture it",
    "compress net.py:Branch --data digits --macs 0.5 --form graph -o new": "torch.export cannot capture it",
    "inspect convpare:digits --input 1,3,8,8": r"does not run on inputs of shape \(1, 3, 8, 8\).*--input",
    "inspect convpare:digits --input 1,1,8": r"does not run on inputs of shape \(1, 1, 8\)",
    "inspect convpare:digits --input 1,1,1,8,8": r"does not run on inputs of shape \(1, 1, 1, 8, 8\)",
    "inspect convpare:digits --input 1x1x8x8": "--input is '1x1x8x8'; expected whole numbers",
    "inspect convpare:digits --input 1,1,0,8": "--input is '1,1,0,8'",
    "inspect convpare:digits --input 1,1,99999999,99999999": "does not fit into memory",
    "inspect empty": r"empty/plan\.json; an artifact is a folder",
    "evaluate thesis --data digits": r"thesis/plan\.json; an artifact is a folder",
}

WRONG_IMAGES = {
    "inspect convpare:digits --data nowhere": "data 'nowhere' does not exist.*Valid forms",
    "inspect convpare:digits --data digit": "Did you mean digits",
    "inspect convpare:digits --data file": "is neither a folder nor an .npz file",
    "inspect convpare:digits --data empty": "empty holds no readable images",
    "inspect convpare:digits --data text.npz": "text.npz is damaged or no .npz file",
    "inspect convpare:digits --data objects.npz": "objects.npz cannot be read as an .npz file of plain arrays",
    "inspect convpare:digits --data cifar10:nowhere": "nowhere is not a folder",
    "inspect convpare:digits --data rgb.npz": r"rgb.npz: .* 3 channel\(s\), but mean and std have 1 value",
    "inspect convpare:resnet20 --data grey.npz": r"grey.npz: .* 1 channel\(s\), but mean and std have 3 value",
    "compress convpare:resnet56 --data digits --macs 0.5 -o new": r"digits: .* 1 channel\(s\)",
    "compress convpare:resnet56 --data digits --mean 0 --std 1 --macs 0.5 -o new": (
        "convpare:resnet56 does not run on the images of digits, which are 1×8×8 .* made for 3×32×32"
    ),
    "compress net.py:Flat --data small.npz --input 1,1,8,8 --macs 0.5 -o new": (
        "net.py:Flat does not run on the images of small.npz, which are 1×6×6"
    ),
    "compress net.py:Broken --data unlabelled.npz --macs 0.5 -o new": "net.py:Broken gives NaN for the first image",
    "inspect convpare:resnet20 --data photos --mean 0.5,0.5": "photos: mean .* and std .* need the same length",
    "inspect convpare:resnet20 --data photos --mean 0.5,x,1": "--mean is '0.5,x,1'; expected numbers",
    "inspect convpare:resnet20 --data photos --std 0,0,0": "std .* above zero",
    "inspect convpare:resnet20 --data photos --crop 64": r"photos/0.jpg: a crop of 64 pixels does not fit .*40x40",
    "inspect convpare:resnet20 --data photos --resize 0": "--resize",
    "inspect convpare:digits --data digits --classes none.txt": "--classes only says the order of class folders",
    "inspect convpare:resnet20 --data classes --classes none.txt": "none.txt cannot be read",
    f"evaluate {DIGITS} --data unlabelled.npz": "unlabelled.npz have no labels",
    f"evaluate {DIGITS} --data beyond.npz": "labels go from 7 to 16, but the model has 10 outputs",
    f"evaluate {DIGITS} --data negative.npz": "negative.npz: the training labels start at -1",
    "evaluate net.py:Dense --data digits": "accuracy needs a classifier's",
    f"compress {DIGITS} --data digits --test unlabelled.npz --macs 0.5 -o new": "unlabelled.npz have no labels",
    f"compress {DIGITS} --data digits --test rgb.npz --macs 0.5 -o new": "rgb.npz: ",
    f"compress {DIGITS} --data one.npz --macs 0.5 -o new": "calibration images, 1 given",
}

WRONG_PLANS = {
    f"{COMPRESS} --macs 0.0001": "macs 0.0001 was asked for, at best 0.001 can be reached",
    f"{COMPRESS} --macs 0.5 --params 0.0001": "params 0.0001 was asked for, at best",
    f"{COMPRESS} --macs 0.5 --round-to 1000": "macs 0.5 was asked for, at best 1 can be reached",
    f"{COMPRESS} --macs 0.5 --exclude fc": "no group 'fc' in DigitsNet; its groups are stem.0",
}

WRONG_PLACES = {
    "compress convpare:digits --data digits --macs 0.5 -o file": "file is a file; an artifact is a folder",
    "compress convpare:digits --data digits --macs 0.5 -o file/new": "file is a file; choose another place",
    "compress convpare:digits --data digits --macs 0.5 -o thesis": "thesis holds 'thesis.tex', which would be lost",
    "compress convpare:digits --data digits --macs 0.5 -o .": "-o names the current folder",
    'compress convpare:digits --data digits --macs 0.5 -o ""': "-o names the current folder",
    f"{COMPRESS} --macs 0.5 --json nowhere/x.json": "there is no folder nowhere; make it",
    f"{COMPRESS} --macs 0.5 --json thesis": "--json is thesis, a folder",
    f"{COMPRESS} --macs 0.5 --json new/x.json": "inside an artifact",
    f"{COMPRESS} --macs 0.5 --json digits.safetensors": "which is there and holds something else",
    f"{COMPRESS} --macs 0.5 --json /dev/null": "no ordinary file",
    "inspect convpare:digits --json file/x.json": "no folder file",
    "evaluate convpare:digits --data digits --json nowhere/x.json": "no folder nowhere",
    f"export {DIGITS} --onnx nowhere/a.onnx": "--onnx is nowhere/a.onnx, but there is no folder nowhere",
    f"export {DIGITS} --onnx thesis": "--onnx is thesis, a folder; give the name of a file",
    f"export {DIGITS} --onnx digits.safetensors": "which is there and holds something else",
    f"export {DIGITS} --pt2 nowhere/a.pt2": "there is no folder nowhere",
    f"export {DIGITS} --pt2 a.onnx": "--pt2 is a.onnx; expected a name that ends in .pt2",
    f"export {DIGITS} --pt2 file": "--pt2 is file; expected a name that ends in .pt2",
    f"export {DIGITS} --torch thesis": "thesis holds 'thesis.tex', which would be lost",
    f"export {DIGITS} --torch file": "file is a file; give the name of a folder",
    f"export {DIGITS} --torch nowhere/a": "there is no folder nowhere",
    f"export {DIGITS} --onnx a.onnx --json nowhere/x.json": "there is no folder nowhere",
    f"export {DIGITS} --onnx a.json --json a.json": "--json is a.json, which is what --onnx writes",
    f"export {DIGITS} --torch new --json new/x.json": "inside",
}  # fmt: skip


@pytest.mark.parametrize(
    ("line", "message"),
    [
        pair
        for group in (WRONG_OPTIONS, WRONG_MODELS, WRONG_IMAGES, WRONG_PLANS, WRONG_PLACES)
        for pair in group.items()
    ],
)
def test_one_message_and_exit_code_1(run: Run, place: Path, line: str, message: str):
    before = tree(place)
    result = run(line)
    assert result.code == 1
    assert result.out == ""
    assert result.err.count("error: ") == 1
    assert "Traceback" not in result.err
    assert re.search(message, result.err), result.err
    assert tree(place) == before


@pytest.mark.parametrize("line", [*WRONG_PLACES, *WRONG_OPTIONS])
def test_fails_before_the_work(run: Run, monkeypatch: pytest.MonkeyPatch, line: str):
    def work(*_: object, **__: object) -> None:
        raise AssertionError("the model was opened first")

    monkeypatch.setattr(cli.models, "load_model", work)
    monkeypatch.setattr(cli, "load_artifact", work)
    assert run(line).code == 1


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs Linux' /proc, where even root cannot write")
def test_unwritable_places(run: Run):
    result = run("compress convpare:digits --data digits --macs 0.5 -o /proc/new")
    assert (result.code, result.out) == (1, "")
    assert "/proc/new cannot be written" in result.err
    result = run("inspect convpare:digits --json /proc/x.json")
    assert (result.code, result.out) == (1, "")
    assert "--json is /proc/x.json, which cannot be written" in result.err


def test_full_disk_under_the_output(run: Run, monkeypatch: pytest.MonkeyPatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cli, "write_json", full)
    result = run("inspect convpare:digits")
    assert result.code == 1
    assert "No space left on device" in result.err


def test_nothing_was_executed(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """After the tests that give pickles to every command; what they hold would show."""
    assert not (place / "executed").exists()
    monkeypatch.chdir(tmp_path)
    pickle.loads((place / "evil.pt").read_bytes())
    assert (tmp_path / "executed").exists()


# ------------------------------------------------------------------------------------------------------------ artifacts


def truncate(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def edit(folder: Path) -> None:
    text = (folder / "plan.json").read_text()
    (folder / "plan.json").write_text(text.replace('"criterion": "qsfm-ssim"', '"criterion": "qsfm-psnr"'))


def pickle_weights(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(pickle.dumps(Evil()))


def pickle_record(folder: Path) -> None:
    (folder / "plan.json").write_bytes(pickle.dumps(Evil()))


def lose_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, "is damaged or was replaced"),
        (edit, "edited or damaged"),
        (pickle_weights, "is damaged or was replaced"),
        (pickle_record, "cannot be used"),
        (lose_weights, "there is no file .*model.safetensors"),
    ],
)
def test_damaged_artifacts(run: Run, made: Path, damage: Callable[[Path], None], message: str):
    folder = made.with_name("damaged")
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(made, folder)
    damage(folder)
    before = tree(folder)
    for line in (
        "inspect damaged",
        "evaluate damaged --data digits",
        f"compress damaged --macs 0.9 {NO_IMAGES} -o new",
    ):
        result = run(line)
        assert (result.code, result.out) == (1, "")
        assert re.search(message, result.err), result.err
    assert tree(folder) == before
    assert not folder.with_name("executed").exists()
    shutil.rmtree(folder)


def test_options_that_an_artifact_has_no_use_for(run: Run, made: Path):
    assert "--weights is for models that are built by name" in run("inspect made --weights digits.safetensors").err
    assert "--num-classes is for models" in run("inspect made --num-classes 3").err
    result = run("evaluate made --data digits --model net.py:make")
    assert result.code == 1
    assert "the model in made is a 'DigitsNet', but the factory gives a 'Net'" in result.err
    assert "inside an artifact" in run("inspect made --json made/x.json").err


def test_artifact_of_an_artifact(run: Run, made: Path):
    first = load_artifact(made)
    assert run("compress made --data digits --macs 0.5 -o smaller --json smaller.json").code == 0
    second = load_artifact("smaller")
    assert (second.spec, second.preprocessing) == ("convpare:digits", first.preprocessing)
    assert first.plan is not None and second.plan is not None
    assert second.plan.before == first.plan.after
    figures = json.loads(Path("smaller.json").read_text())
    result = run("evaluate smaller --data digits --json smaller.json")
    assert result.code == 0
    assert json.loads(Path("smaller.json").read_text())["top1"] == figures["after"]["top1"]
    assert run("inspect smaller --data digits --images 8").code == 0


def test_artifact_in_its_own_place(run: Run, made: Path):
    shutil.copytree(made, "itself")
    assert run("compress itself --data digits --macs 0.5 --images 16 -o itself").code == 0
    plan, old = load_artifact("itself").plan, load_artifact(made).plan
    assert plan is not None and old is not None
    assert plan.before == old.after


def test_own_code(run: Run):
    assert run("compress net.py:make --data digits --macs 0.5 --images 64 -o own --json own.json").code == 0
    after = json.loads(Path("own.json").read_text())["after"]
    refused = run("evaluate own --data digits")
    assert refused.code == 1
    assert "not run unasked" in refused.err
    assert "of the factory 'net.py:make'" in refused.err
    assert "--model SPEC" in refused.err
    assert run("evaluate own --data digits --model net.py:make --json own.json").code == 0
    assert json.loads(Path("own.json").read_text())["top1"] == after["top1"]
    assert "but the factory gives a 'Dense'" in run("evaluate own --data digits --model net.py:Dense").err
    assert run("compress own --model net.py:make --data digits --macs 0.7 --images 64 -o own2").code == 0
    assert run("evaluate own2 --data digits --model net.py:make").code == 0
    assert load_artifact("own2", lambda: artifact.load_model("net.py:make").module).spec == "net.py:make"


def test_number_of_classes_survives(run: Run):
    assert run(f"compress convpare:digits --num-classes 3 --macs 0.5 {NO_IMAGES} -o three").code == 0
    assert load_artifact("three").module(torch.zeros(1, 1, 8, 8)).shape == (1, 3)


# ------------------------------------------------------------------------------------------------------ what goes right


@pytest.mark.parametrize(
    "options",
    [
        "--macs 0.5 --round-to 8",
        "--threshold 0.05",
        "--macs 0.5 --rounds 2",
        "--macs 0.5 --params 0.4 --scope all --recover batch-norm",
        "--macs 0.6 --exclude block1.conv1,stem.0 --scope all --allocation global --criterion l1 --recover none",
        "--macs 0.5 --criterion qsfm-psnr --tap conv --window gaussian --data-range 4 --rule mean --limit 50",
        "--macs 0.5 --who norm --data-range image --recover least-squares --recover-images 64 --samples 4",
        "--macs 0.5 --criterion reconstruction --seed 7 --test grey.npz",
        "--macs 0.5 --criterion sensitivity --methods prune,factorize --scope all",
    ],
)
def test_options_of_compress(run: Run, options: str):
    assert run(f"{COMPRESS}-options --images 64 --json options.json {options}").code == 0
    plan = load_artifact("new-options").plan
    figures = json.loads(Path("options.json").read_text())
    assert plan is not None
    assert figures["self_check"]["passed"]
    assert figures["achieved"] == plan.achieved
    for metric, fraction in figures["requested"].items():
        assert figures["after"][metric] <= fraction * figures["before"][metric]
    kept = {edit.group: len(edit.keep) for edit in plan.edits}
    if "--round-to 8" in options:
        assert kept and all(count % 8 == 0 for count in kept.values())
    tried = figures["tried"] or {"prune": 0.0}
    assert ("factorize" in options) == (len(tried) == 3)
    if not plan.edits or not plan.factorizations:  # one method alone did better, or was the only one
        assert ("factorize" if plan.factorizations else "prune") == min(tried, key=lambda name: tried[name])
    if "--exclude" in options:
        assert kept and not {"block1.conv1", "stem.0"} & set(kept)
    if "--limit" in options:
        assert figures["test_images"] == 50
    if "--test grey.npz" in options:
        assert figures["test_images"] == 60


def test_without_images(run: Run, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("torchvision")
    result = run(
        f"compress torchvision:squeezenet1_1 --input 1,3,64,64 --macs 0.5 {NO_IMAGES} -o squeezed --json s.json"
    )
    assert result.code == 0
    assert "warning: the weights of torchvision:squeezenet1_1 are random" in result.err
    figures = json.loads(Path("s.json").read_text())
    assert figures["after"]["macs"] <= 0.5 * figures["before"]["macs"]
    assert figures["before"]["top1"] is None
    assert "top-1" not in result.out
    saved = load_artifact("squeezed")
    assert saved.preprocessing is not None
    assert saved.preprocessing.crop == 224


def test_folder_without_labels(run: Run):
    options = "--macs 0.7 --images 8 --recover batch-norm -o photographed --json p.json"
    result = run(f"compress convpare:resnet20 --data photos {options}")
    assert result.code == 0
    assert re.search(r"warning: skipped, not a readable image: photos/cut.jpg: .*truncated", result.err)
    figures = json.loads(Path("p.json").read_text())
    assert [stage["top1"] for stage in figures["stages"]] == [None] * 3
    assert figures["recovery"]["images"] == 8
    assert "top-1" not in result.out
    assert "images: no labels" in result.out


def test_images_of_another_size_are_said(run: Run):
    """40×40 is near enough to 32×32; twelve times the pixels is not."""
    near = run("evaluate convpare:resnet20 --data classes")
    assert "was made for" not in near.err
    far = run("evaluate convpare:resnet20 --data classes --resize 110")
    assert far.code == 0
    assert re.search(r"warning: the images of classes are 3×110×110, .* made for 3×32×32: give --resize", far.err)


def test_class_folders(run: Run):
    Path("names.txt").write_text("dog\ncat\n")
    result = run("evaluate convpare:resnet20 --data classes --classes names.txt --json c.json")
    assert result.code == 0
    assert "skipped, not a readable image: classes/cat/text.png" in result.err
    assert json.loads(Path("c.json").read_text())["images"] == 16


def test_many_unreadable_images_are_counted(run: Run):
    shutil.copytree("photos", "rubbish")
    for i in range(7):
        Path(f"rubbish/x{i}.png").write_text("no image")
    result = run("inspect convpare:resnet20 --data rubbish --images 4")
    assert result.err.count("skipped, not a readable image") == 5
    assert "skipped 3 more unreadable images" in result.err


def test_json_of_inspect(run: Run):
    assert run(f"inspect {DIGITS} --data digits --images 16 --json i.json").code == 0
    found = json.loads(Path("i.json").read_text())
    assert {"model", "inputs", "layers", "groups", "frozen", "macs", "params", "activations"} <= set(found)
    assert set(found["layers"][0]) == {
        "name", "kind", "weight", "macs", "params", "activations", "cuts", "k_over_rank", "best_cut", "least_macs",
    }  # fmt: skip
    cut = found["layers"][1]["cuts"]["o|ihw"]
    assert {"rank", "effective_rank", "entropy", "stable_rank", "break_even_rank", "chain"} <= set(cut)
    assert (cut["rank"], cut["full_rank"], cut["break_even_rank"]) == (32, 32, 28)  # 29 · (32 + 288) > 32 · 288
    assert set(found["groups"][0]) == {"name", "channels", "producers", "consumers", "activations", "inexact"}
    activations = found["groups"][0]["activations"]
    assert {"similar", "effective_rank", "dead", "pairs"} <= set(activations)
    assert [(b["name"], b["k"], b["r"], b["k_over_r"]) for b in found["blocks"]][-1] == ("block2.conv2", 64, 64, 1)
    assert found["complexity"]["d_naive"] == sum(layer["params"] for layer in found["layers"]) - 10
    assert found["prunable_share"] == {"module": 1.0, "module_marked": 1.0}
    assert found["parts"] == []
    assert found["frozen"] == [{"layer": "fc", "channels": 10, "reason": "the model's output"}]
    assert sum(layer["macs"] for layer in found["layers"]) == found["macs"]


def test_what_cannot_be_captured_as_a_whole(run: Run):
    result = run("inspect net.py:Branch --input 1,1,8,8")
    assert result.code == 0
    assert "captured in parts (a, norm, b, fc); what runs between them is left as it is" in result.out
    assert "no channel can be removed" in result.out
    assert "0.0 % of the MACs" in result.out


def test_the_graph_form_needs_no_code(run: Run):
    inspected = run("inspect net.py:Written --input 1,1,8,8")
    assert "takes a number from its forward that does not follow them" in inspected.out
    assert re.search(r"0\.0 % of the MACs .* exactly, 100\.0 % in the graph form \(--form graph\)", inspected.out)
    result = run("compress net.py:Written --data digits --macs 0.6 --criterion l2 -o new")
    assert result.code == 1
    assert "nothing in Written can be removed" in result.err
    assert "--form graph" in result.err
    made = run("compress net.py:Written --data digits --macs 0.6 --criterion l2 --form graph --json c.json -o new")
    assert made.code == 0, made.err
    assert "graph form" in made.out
    told = json.loads(Path("c.json").read_text())
    assert told["form"] == "graph"
    assert told["achieved"]["macs"] <= 0.6
    Path("net.py").rename("gone.py")
    evaluated = run("evaluate new --data digits --json e.json")
    Path("gone.py").rename("net.py")
    assert evaluated.code == 0
    assert json.loads(Path("e.json").read_text())["top1"] == told["after"]["top1"]


def test_factorized_networks_are_networks_like_any(run: Run):
    """Evaluated, inspected, and shown layer by layer."""
    line = "--macs 0.4 --methods factorize --criterion reconstruction --images 64 --json c.json"
    made = run(f"compress {DIGITS} --data digits -o new {line}")
    assert made.code == 0, made.err
    assert re.search(r"layer +weight +becomes +rank +adds error", made.out)
    assert re.search(r"block2\.conv2 +64×64×3×3 +\S+ +\d+ +\S+", made.out)
    told = json.loads(Path("c.json").read_text())
    assert told["achieved"]["macs"] <= 0.4
    assert told["after"]["top1"] > told["before"]["top1"] - 5
    evaluated = run("evaluate new --data digits --json e.json")
    assert (evaluated.code, json.loads(Path("e.json").read_text())["top1"]) == (0, told["after"]["top1"])
    inspected = run("inspect new --json i.json")
    assert inspected.code == 0, inspected.err
    found = json.loads(Path("i.json").read_text())
    assert (found["macs"], found["params"]) == (told["after"]["macs"], told["after"]["params"])
    assert {"block2.conv2.0", "block2.conv2.1"} <= {layer["name"] for layer in found["layers"]}


def test_a_plan_is_seen_edited_and_applied(run: Run):
    """What compress does in one go, in two steps: the same network and the same figures."""
    how = "--criterion sensitivity --methods prune,factorize --images 64 --macs 0.5 --params 0.6 --scope all"
    before = tree(Path())
    result = run(f"plan {DIGITS} --data digits {how}")
    assert result.code == 0, result.err
    assert tree(Path()) == before
    assert re.search(r"group .* saves MACs .* adds error", result.out)
    assert re.search(r"MACs .* × 0\.[45]\d+ +× 0\.5 +\S+ of the error", result.out)
    assert run(f"plan {DIGITS} --data digits {how} -o plan.json --json found.json").code == 0
    found = json.loads(Path("found.json").read_text())
    assert found["plan"] == json.loads(Path("plan.json").read_text())
    assert set(found["prices"]) == {"macs", "params"}
    assert run(f"apply {DIGITS} plan.json --data digits -o planned --json planned.json").code == 0
    figures = json.loads(Path("planned.json").read_text())
    assert figures["self_check"]["passed"]
    assert [stage["name"] for stage in figures["stages"]][:2] == ["before", "surgery"]
    assert figures["after"]["macs"] == found["plan"]["after"]["macs"]
    saved = load_artifact("planned").plan
    assert saved is not None
    assert saved.to_json() == found["plan"]
    content = found["plan"]
    content["edits"][0]["keep"] = content["edits"][0]["keep"][1:]
    content["edits"] = [edit for edit in content["edits"] if edit["edit"] != "factorize"]
    Path("plan.json").write_text(json.dumps(content))
    assert run(f"apply {DIGITS} plan.json --recover none -o edited --json edited.json").code == 0
    assert json.loads(Path("edited.json").read_text())["stages"][1]["top1"] is None
    for other, message in (
        ("net.py:make", "another network than this Net: it has no group"),
        ("convpare:resnet20", "made for DigitsNet, and does not suit this network: CifarResNet does not run"),
    ):
        refused = run(f"apply {other} plan.json --recover none -o other")
        assert refused.code == 1
        assert message in refused.err
    assert not Path("other").exists()


def test_recovery_by_training(run: Run, made: Path):
    """In `compress` and of an artifact that is there; the state of training is gone when it is over."""
    line = f"compress {DIGITS} --data digits --macs 0.3 --criterion l2 --recover distill --epochs 2 --train-images 200"
    result = run(f"{line} --lr 0.01 --batch-size 50 --images 64 -o trained --json trained.json")
    assert result.code == 0, result.err
    found = json.loads(Path("trained.json").read_text())
    assert [stage["name"] for stage in found["stages"]] == ["before", "surgery", "least-squares", "training"]
    assert (found["recovery"]["gradient_passes"], found["recovery"]["labels"]) == (360, False)
    options = found["recovery"]["training"]["options"]
    assert (options["lr"], options["batch_size"], options["epochs"]) == (0.01, 50, 2)
    assert "training: 2 epochs of 180 images without labels, 360 gradients of images" in result.out
    assert found["after"]["top1"] == pytest.approx(100 * evaluation_of(run, "trained"))

    line = f"recover {made} --teacher {DIGITS} --data digits --train-images 200 -o better --json better.json"
    result = run(f"{line} --recover finetune --epochs 1")
    assert result.code == 0, result.err
    found = json.loads(Path("better.json").read_text())
    assert [stage["name"] for stage in found["stages"]][:2] == ["original", "given"]
    assert found["stages"][-1]["name"] == "training"
    assert (found["recovery"]["gradient_passes"], found["recovery"]["labels"]) == (180, True)
    again, given = load_artifact("better"), load_artifact(made)
    assert again.plan is not None
    assert given.plan is not None
    assert again.plan.to_json() == given.plan.to_json()
    assert again.figures["regained"] == found
    assert again.figures["stages"] == given.figures["stages"]
    assert found["stages"][-1]["top1"] == pytest.approx(100 * evaluation_of(run, "better"))
    assert not list(Path().glob("*.training"))


def evaluation_of(run: Run, artifact: str) -> float:
    assert run(f"evaluate {artifact} --data digits --json e.json").code == 0
    return float(json.loads(Path("e.json").read_text())["top1"]) / 100


def test_a_recovery_that_was_stopped_goes_on(run: Run, made: Path, monkeypatch: pytest.MonkeyPatch):
    line = f"recover {made} --teacher {DIGITS} --data digits --train-images 300 --epochs 2"
    assert run(f"{line} -o whole").code == 0
    monkeypatch.setattr(training, "SAVED_EVERY", 0.0)
    write, written = training.write_checkpoint, []

    def stop(*arguments: Any) -> None:
        write(*arguments)
        written.append(1)
        if len(written) == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(training, "write_checkpoint", stop)
    stopped = run(f"{line} -o halted")
    assert (stopped.code, stopped.err.splitlines()[-1]) == (130, "error: interrupted; nothing is half-written")
    assert Path("halted.training").is_file()
    assert not Path("halted").exists()
    assert run(f"{line} -o halted").code == 0
    assert not Path("halted.training").exists()
    whole, halted = (load_artifact(name).module.state_dict() for name in ("whole", "halted"))
    assert all(torch.equal(value, halted[name]) for name, value in whole.items())
    Path("other.training").write_bytes(b"what was here before")
    refused = run(f"{line} -o other")
    assert refused.code == 1
    assert "the checkpoint other.training is damaged" in refused.err


def test_a_budget_of_latency(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """On the clock of this machine, whatever it says: what is told is what was measured, or that it cannot be."""
    monkeypatch.setenv("CONVPARE_CACHE", str(tmp_path))
    how = "--criterion l2 --latency 0.95 --batch 16 --threads 1 --scope all"
    seen = run(f"plan {DIGITS} {how} -o timed.json")
    if seen.code == 0:
        assert re.search(r"latency, ms +\S+ +\S+ +× 0\.\d+ +× 0\.95", seen.out)
        assert "latency: predicted from the times of layers, eager, batch of 16, threads: 1" in seen.out
        before, after = json.loads(Path("timed.json").read_text())["options"]["latency_ms"]
        assert 0 < after <= 0.95 * before
    else:
        assert re.search(r"infeasible: latency 0\.95 was asked for, at best", seen.err)
    assert len(list(tmp_path.iterdir())) == 1
    result = run(f"compress {DIGITS} {how} --recover none -o timed --json timed.json")
    if result.code == 0:
        told = json.loads(Path("timed.json").read_text())["latency"]
        assert told["ms"][1] <= 0.95 * told["ms"][0]
        assert (told["runtime"], told["batch"], told["threads"]) == ("eager", 16, 1)
        assert "latency under the budget of × 0.95" in result.out
    else:
        assert re.search(r"latency 0\.95 was asked for", result.err)
    swept = run(f"plan {DIGITS} {how} --sweep")
    assert swept.code == 0
    assert re.search(r"latency asked +MACs +parameters +latency +error", swept.out)
    (tmp_path / next(tmp_path.iterdir()).name).write_text("{")
    damaged = run(f"plan {DIGITS} {how}")
    assert damaged.code == 1
    assert "remove it, and it is measured anew" in damaged.err


def test_bench(run: Run, made: Path):
    """Two of one name are told apart, and an artifact brings its own shape."""
    line = "bench convpare:digits made made --weights digits.safetensors --batches 1,2 --seconds 0 --threads 1"
    result = run(f"{line} --runtimes eager,onnxruntime --json bench.json")
    assert result.code == 0, result.err
    found = json.loads(Path("bench.json").read_text())
    assert [entry["name"] for entry in found["networks"]] == ["convpare:digits", "made (1)", "made (2)"]
    assert [(s["runtime"], s["batch"]) for s in found["settings"]] == [
        ("eager", 1), ("eager", 2), ("onnxruntime", 1), ("onnxruntime", 2)
    ]  # fmt: skip
    assert found["networks"][1]["macs"] <= 0.5 * found["networks"][0]["macs"]
    assert re.search(r"eager +1 +1 +convpare:digits +\S+ +\S+–\S+\n +made \(1\) .*× \S+ +÷ 2\.\d+", result.out)


def test_the_whole_trade_off(run: Run):
    pytest.importorskip("plotly")
    result = run(f"plan {DIGITS} --criterion l2 --macs 0.02 --sweep --json sweep.json --plot sweep.html")
    assert result.code == 0, result.err
    steps = json.loads(Path("sweep.json").read_text())["steps"]
    assert len(steps) == 10
    reached = [step["plan"]["achieved"]["macs"] for step in steps if step["plan"]]
    assert reached == sorted(reached, reverse=True)
    assert len(result.out.splitlines()) > 10
    assert "What the budget costs" in Path("sweep.html").read_text()


def test_marked_groups_stay_unless_asked_for(run: Run):
    inspected = run("inspect net.py:Layered --input 1,1,8,8")
    assert "layer_norm in norm normalises over them" in inspected.out
    refused = run("compress net.py:Layered --data digits --macs 0.2 --criterion l2 --scope all -o new")
    assert refused.code == 1
    assert "--inexact" in refused.err
    made = run("compress net.py:Layered --data digits --macs 0.2 --criterion l2 --scope all --inexact -o new")
    assert made.code == 0, made.err
    assert "groups that by nature change the others are not part of it (1)" in made.out


def test_json_of_compress_and_evaluate(run: Run):
    result = run(f"{COMPRESS} --macs 0.5 --images 64 --json c.json")
    assert result.code == 0
    found = json.loads(Path("c.json").read_text())
    for side in ("before", "after"):
        assert {"macs", "params", "top1", "file_bytes", "latency_ms"} <= set(found[side])
    assert found["requested"] == {"macs": 0.5}
    assert set(found["achieved"]) == {"macs", "params"}
    assert found["achieved"]["macs"] == found["after"]["macs"] / found["before"]["macs"] <= 0.5
    assert [set(stage) for stage in found["stages"]] == [{"name", "top1", "seconds"}] * 3
    assert [stage["name"] for stage in found["stages"]] == ["before", "surgery", "least-squares"]
    assert found["stages"][-1]["top1"] == found["after"]["top1"]
    assert found["self_check"]["passed"] is True
    assert 0 <= found["self_check"]["max_relative_error"] <= 1e-9
    assert found["after"]["file_bytes"] == Path("new/model.safetensors").stat().st_size
    assert json.loads(Path("new/plan.json").read_text())["figures"] == found
    assert run("evaluate new --data digits --json e.json").code == 0
    found = json.loads(Path("e.json").read_text())
    assert (set(found), found["images"]) == ({"top1", "top5", "images", "seconds"}, 355)
    assert Path("e.json").stat().st_mode & 0o777 == Path("net.py").stat().st_mode & 0o777  # as the umask says
    shutil.rmtree("new")


def test_json_without_nan():
    assert finite({"a": [1.0, float("nan")], "b": {"c": float("inf")}}) == {
        "a": [1.0, None],
        "b": {"c": None},
    }


def test_size_of_tensors_that_share_memory():
    module = torch.nn.Linear(4, 4)
    module.register_buffer("view", module.weight.data[:2])
    plain = torch.nn.Linear(4, 4)
    plain.register_buffer("view", torch.zeros(2, 4))
    assert measurement.file_bytes(module) == measurement.file_bytes(plain)


def test_nothing_to_remove_is_said(run: Run):
    result = run(f"compress {DIGITS} --macs 1 {NO_IMAGES} -o whole")
    assert result.code == 0
    assert "warning: nothing was removed" in result.err


# --------------------------------------------------------------------------------------------------------- what it says


def test_help_and_version(run: Run):
    nothing = run("")
    assert (nothing.code, nothing.err) == (0, "")
    assert run("--help").out == nothing.out
    assert all(name in nothing.out for name in ("inspect", "compress", "evaluate", "demo", "Exit codes"))
    assert re.fullmatch(r"\d+\.\d+\.\d+\n", run("--version").out)
    for command in ("inspect", "compress", "evaluate", "demo"):
        page = run(f"{command} --help")
        assert (page.code, page.err) == (0, "")
        assert max(map(len, page.out.splitlines())) <= 80


def test_help_names_every_choice(run: Run):
    page = " ".join(run("compress --help").out.replace("│", " ").split())
    options = re.findall(r"--[a-z-]+", page)
    for name in ("weights", "input", "num-classes", "model", "data", "mean", "std", "resize", "crop", "classes", "test",
                 "limit", "macs", "params", "threshold", "criterion", "methods", "scope", "allocation", "round-to",
                 "exclude", "images", "rounds", "seed", "tap", "window", "data-range", "rule", "who", "recover",
                 "recover-images", "samples", "epochs", "minutes", "train-images", "lr", "batch-size",
                 "output", "json"):  # fmt: skip
        assert f"--{name}" in options, name
    assert "--empty-exclude" not in options
    assert all(name in page for name in criteria())


def test_choices_are_those_of_the_library():
    method, qsfm = get_type_hints(cli.MethodArguments), get_type_hints(cli.QSFMArguments)
    assert set(get_args(method["scope"])) == set(SCOPES)
    assert set(get_args(get_args(method["allocation"])[0])) == set(ALLOCATIONS)
    for arguments in (cli.RecoveryArguments, cli.TrainingArguments):
        assert set(get_args(get_type_hints(arguments)["recover"])) == set(METHODS)
    assert set(qsfm) == {field.name for field in dataclasses.fields(QSFMOptions)}


def masked(text: str) -> str:
    """Without what differs from machine to machine."""
    text = re.sub(r"(?m)^((?:surgery|least-squares) +)\d.*$", r"\1(masked)", text)
    text = re.sub(r"(?m)^(top-1 % +\S+|latency, ms) .*$", r"\1 (masked)", text)
    text = re.sub(r"(?ms)^recovery: .*?\)$", "recovery: (masked)", text)
    return re.sub(r"relative error \S+", "relative error #", text)


@pytest.mark.parametrize("columns", [None, 60])
def test_tables(run: Run, monkeypatch: pytest.MonkeyPatch, golden: Callable[[str, str], None], columns: int | None):
    if columns:
        monkeypatch.setenv("COLUMNS", str(columns))
    suffix = f"-{columns}" if columns else ""
    inspected = run(f"inspect {DIGITS} --data digits")
    compressed = run(f"{COMPRESS}-table --macs 0.5 --params 0.6")
    for name, result in (("inspect", inspected), ("compress", compressed)):
        assert result.code == 0
        assert "\x1b" not in result.out
        assert max(map(len, result.out.splitlines())) <= (columns or 200)
        golden(f"{name}{suffix}.txt", masked(result.out))


def test_numbers_are_never_cut(run: Run, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "20")
    result = run("inspect convpare:digits")
    assert all(number in result.out for number in ("589,824", "64×64×3×3", "36,864"))


def test_sentences_are_plain_text(capsys: pytest.CaptureFixture[str]):
    terminal.show("[bold]:warning: 1 \\[x]")
    terminal.warn("[red]x[/]")
    terminal.fail("a [1, 2]")
    captured = capsys.readouterr()
    assert captured.out == "[bold]:warning: 1 \\[x]\n"
    assert captured.err == "warning: [red]x[/]\nerror: a [1, 2]\n"


def test_what_libraries_print_is_no_result():
    """C code that writes to standard output while work goes on: the results alone are there."""
    program = (
        "import ctypes\nfrom convpare import terminal\nlibrary = ctypes.CDLL(None)\n"
        "with terminal.progress():\n    library.puts(b'chatter')\nterminal.show('result')\nlibrary.puts(b'later')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert sorted(done.stdout.split()) == ["later", "result"]
    assert done.stderr.split() == ["chatter"]


def test_progress_in_logs():
    file = io.StringIO()
    lines = terminal._Lines(Console(file=file), first=0.15, later=60.0)
    lines.tell("short", 0, 1)
    lines.tell("long", 0, 10)
    deadline = time.monotonic() + 10
    while not file.getvalue() and time.monotonic() < deadline:
        lines.tell("long", 3, 10)
        time.sleep(0.01)
    lines.stop()
    assert file.getvalue() == "long 3/10\n"


# --------------------------------------------------------------------------------------------------------- interruption


@pytest.mark.parametrize("where", ["cli.compress", "cli.measured", "artifact._write_record", "artifact._sync_folder"])
def test_interrupted_compress_leaves_the_old_artifact(
    run: Run, made: Path, monkeypatch: pytest.MonkeyPatch, where: str
):
    shutil.copytree(made, "kept")
    before = tree(made.parent)

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(f"convpare.{where}", interrupt)
    result = run(f"compress {DIGITS} --macs 0.7 {NO_IMAGES} -o kept --json kept.json")
    assert (result.code, result.out) == (130, "")
    assert "error: interrupted" in result.err
    assert tree(made.parent) == before
    assert load_artifact("kept").plan == load_artifact(made).plan
    shutil.rmtree("kept")


def child(*arguments: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", "from convpare.cli import main; main()", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", **environment},
    )


def test_signal_to_a_process(made: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(made.parent)
    shutil.copytree(made, "kept")
    before = tree(made.parent)
    process = child("compress", "net.py:Sleepy", "--data", "digits", "--macs", "0.5", "-o", "kept")
    deadline = time.monotonic() + 60
    while not Path("asleep").exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    Path("asleep").unlink()
    assert (process.returncode, out) == (130, "")
    assert err.splitlines()[-1] == "error: interrupted; nothing is half-written"
    assert "Traceback" not in err
    assert tree(made.parent) == before
    shutil.rmtree("kept")


def test_pipe_with_a_poor_encoding():
    process = child("inspect", "convpare:digits", PYTHONIOENCODING="ascii")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "2,415,744" in out
    assert "\x1b" not in out + err


def test_terminal_without_colour():
    """Bars go to standard error and away; with NO_COLOR nothing is coloured."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", "from convpare.cli import main; main()", "inspect", "convpare:digits"],
        stdout=subprocess.PIPE,
        stderr=theirs,
        env={**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1", "TERM": "xterm"},
    )
    os.close(theirs)
    shown = b""
    while True:
        try:
            part = os.read(ours, 4096)
        except OSError:
            part = b""
        if not part:
            break
        shown += part
    assert process.stdout is not None
    out = process.stdout.read()
    assert process.wait(timeout=30) == 0
    os.close(ours)
    assert b"tracing" in shown
    assert not re.search(rb"\x1b\[[0-9;]*m", shown)
    assert b"\x1b" not in out


# ------------------------------------------------------------------------------------------------------------ real data


def test_real_images(run: Run, shared: Path):
    weights = shared / "weights/mobilenet_v1_025-imagenet.safetensors"
    model = f"convpare:mobilenet_v1_025 --weights {weights}"
    data = f"--data {shared}/data/imagenet-calib --test {shared}/data/imagenet500"
    line = (
        f"compress {model} {data} --macs 0.8 --images 32 --limit 100 --recover batch-norm --recover-images 32 -o mobile"
    )
    result = run(f"{line} --json m.json")
    assert result.code == 0
    figures = json.loads(Path("m.json").read_text())
    assert figures["before"]["top1"] > 40
    assert figures["test_images"] == 100
    result = run(f"evaluate mobile --data {shared}/data/imagenet500 --limit 100 --json m.json")
    assert result.code == 0
    assert json.loads(Path("m.json").read_text())["top1"] == figures["after"]["top1"]


# ----------------------------------------------------------------------------------------------------- the experiments


def test_truncate(run: Run):
    options = "--forms o|ihw,oi|hw --fractions 0.5,0.25 --images 100 --retrain 0.25 --retrain-as dense --epochs 1"
    line = f"truncate {DIGITS} --data digits {options} --store p.jsonl --plot f.html --json t.json"
    first = run(line)
    assert first.code == 0, first.err
    found = json.loads(Path("t.json").read_text())
    assert {p["form"] for p in found["points"]} == {"o|ihw", "oi|hw"}
    assert [(r["form"], r["fraction"]) for r in found["retrained"]] == [("none", 1), ("o|ihw", 0.25), ("oi|hw", 0.25)]
    assert Path("f.html").read_text().startswith("<!doctype html>")
    stored = Path("p.jsonl").read_text()
    assert len(stored.splitlines()) == 1 + len(found["points"]) + 3
    assert "tolerated norm loss" in first.out and "all layers, top-1 %" in first.out and "trained again" in first.out
    assert max(map(len, first.out.splitlines())) <= 200
    again = run(line)
    assert (again.code, again.out) == (0, first.out)
    assert Path("p.jsonl").read_text() == stored


def test_theory(run: Run):
    result = run("theory --repetitions 2 --store s.jsonl --plot f.html --json t.json")
    assert result.code == 0, result.err
    found = json.loads(Path("t.json").read_text())
    assert len(found["points"]) == len(Path("s.jsonl").read_text().splitlines()) == 252
    assert all(r["jacobian"] == r["intrinsic"] for r in found["ranks"])
    assert Path("f.html").read_text().startswith("<!doctype html>")
    assert "through 0" in result.out


def test_a_gallery(run: Run):
    result = run(f"inspect {DIGITS} --data digits --images 16 --gallery maps --json i.json")
    assert result.code == 0, result.err
    groups = [g["name"] for g in json.loads(Path("i.json").read_text())["groups"]]
    assert sorted(p.name for p in Path("maps").iterdir()) == sorted(f"{name}.png" for name in groups)
    assert Image.open(f"maps/{groups[0]}.png").size[0] > 400


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("truncate convpare:digits", "needs labelled images: give --data"),
        ("truncate convpare:digits --data digits --forms o|x", "o|x"),
        ("truncate convpare:digits --data digits --fractions 2", "shares of the full rank"),
        ("truncate convpare:digits --data digits --fractions much", "--fractions is 'much'"),
        ("truncate convpare:digits --data digits --store file", "line 1 of file is no point of a truncation"),
        ("truncate convpare:digits --data digits --plot none/f.html", "there is no folder none"),
        (
            "truncate convpare:digits --data digits --plot file",
            "--plot is file, which is there and holds something else",
        ),
        ("theory --plot . --repetitions 2", "--plot is ., a folder"),
        ("theory --repetitions 1", "repetitions"),
        ("theory --store file", "line 1 of file is no point of a simulation"),
        ("inspect convpare:digits --gallery maps", "--gallery shows feature maps and needs images"),
        ("inspect convpare:digits --data digits --gallery file", "--gallery is file, which is no folder"),
        ("inspect convpare:digits --energy 0", "energy is 0"),
    ],
)
def test_experiments_that_cannot_be(run: Run, line: str, message: str):
    result = run(line)
    assert result.code == 1
    assert message in " ".join(result.err.split())


# -------------------------------------------------------------------------------------------------------------- export


def test_export_of_an_artifact(run: Run, made: Path, place: Path):
    """A row for each file with its accuracy, and figures that are those of the files."""
    before = tree(made)
    line = "export made --data digits --limit 100"
    result = run(f"{line} --onnx made.onnx --int8 --json export.json")
    assert result.code == 0, result.err
    found = json.loads((place / "export.json").read_text())
    float32, int8 = found["files"]
    assert float32["size"] == (place / "made.onnx").stat().st_size > (place / "made.int8.onnx").stat().st_size
    assert float32["difference"] < 1e-4 and float32["top1"] == found["top1"] and found["test_images"] == 100
    assert (float32["kind"], int8["kind"], float32["images"]) == ("onnx", "int8", 64)
    rows = [text.split() for text in result.out.splitlines()]
    assert rows[0] == "file bytes made by largest difference images top-1 %".split()
    assert ["made.onnx", f"{float32['size']:,}", "torch.export"] == rows[3][:3]
    assert ["made.int8.onnx", f"{int8['size']:,}", "onnxruntime,", "QDQ"] == rows[4][:4]
    assert "in batches of 1 and 9; opset 18" in result.out
    assert f"the same class as in float on {int8['agreement']:.2f} % of 256 images" in result.out.replace("\n", " ")
    assert "accuracy: of 100 test images, each file in its own runtime" in result.out
    result = run("export made --torch made-torch")
    assert result.code == 0, result.err
    assert "in batches of 1 and 9 of noise, for want of --data" in result.out and "top-1" not in result.out
    assert sorted(path.name for path in (place / "made-torch").iterdir()) == ["model.py", "weights.pt"]
    again = run("export made --torch made-torch")  # over the earlier one
    assert again.code == 0 and again.out == result.out
    assert tree(made) == before
    assert "made/x.onnx, inside an artifact" in run("export made --onnx made/x.onnx").err
    assert "made/x, inside an artifact" in run("export made --torch made/x").err


def test_the_names_of_classes_travel(run: Run, place: Path):
    """From class folders into the artifact, and from there, or from the images, into what is exported."""
    arguments = "--input 1,3,40,40 --data classes --mean 0,0,0 --std 1,1,1"
    line = "compress convpare:vanilla4 --num-classes 2 --macs 0.9 --criterion l2 --recover none -o named"
    result = run(f"{line} {arguments}")
    assert result.code == 0, result.err
    assert load_artifact(place / "named").figures["labels"] == ["cat", "dog"]
    assert run("export named --torch named-torch").code == 0
    assert '"labels": ["cat", "dog"],' in (place / "named-torch" / "model.py").read_text()
    result = run(f"export convpare:vanilla4 --torch other-torch --num-classes 5 {arguments} --limit 3")
    assert "warning: the names of classes are left out: there are 2 labels for outputs of (5,)" in result.err
    assert "labels" not in (place / "other-torch" / "model.py").read_text()


def test_a_failed_export_leaves_nothing(run: Run, place: Path):
    before = tree(place)
    for line, message in (
        ("export net.py:Branch --input 1,1,8,8 --onnx a.onnx", "Branch was not exported to ONNX, nothing was written"),
        ("export net.py:Branch --input 1,1,8,8 --torch a", "cannot capture it"),
        ("export net.py:Branch --input 1,1,8,8 --pt2 a.pt2", "Branch was not exported"),
        ("export nothing --onnx a.onnx", "of no known form"),
        ("export empty --onnx a.onnx", "there is no file .*empty/plan.json"),
        (f"export {DIGITS} --onnx a.onnx --data nowhere", "data 'nowhere' does not exist"),
        (f"export {DIGITS} --onnx a.onnx --tolerance 1e-12", "differ from torch's by .*tolerance 1e-12"),
    ):
        result = run(line)
        assert (result.code, result.out) == (1, "")
        assert re.search(message, result.err), result.err
        assert "Traceback" not in result.err
        assert tree(place) == before
