import importlib
import os
import pickle
import sys
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from convpare.data.preprocessing import Preprocessing
from convpare.errors import ConvpareError
from convpare.zoo import is_builtin, load_model


def small() -> nn.Module:
    return load_model("convpare:digits").module


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


# ---------------------------------------------------------------- builtin models


@pytest.mark.parametrize(
    ("name", "shape", "mean"),
    [
        ("resnet20", (1, 3, 32, 32), 0.485),
        ("resnet32", (1, 3, 32, 32), 0.485),
        ("mobilenet_v1_025", (1, 3, 224, 224), 0.5),
        ("digits", (1, 1, 8, 8), 0.0),
    ],
)
def test_own_models(name, shape, mean):
    source = load_model(f"convpare:{name}", num_classes=7)
    assert source.input_shape == shape
    assert source.preprocessing is not None
    assert source.preprocessing.mean[0] == mean
    assert source.preprocessing.channels == shape[1]
    assert not source.module.training
    assert source.module(torch.zeros(shape)).shape == (1, 7)


def test_torchvision_model():
    pytest.importorskip("torchvision")
    source = load_model("torchvision:resnet18", num_classes=5)
    assert sum(p.numel() for p in source.module.parameters()) == 11_689_512 - 995 * 513
    assert source.input_shape == (1, 3, 224, 224)
    assert source.preprocessing == Preprocessing((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 256, 224)


@pytest.mark.parametrize(("name", "size"), [("googlenet", 64), ("inception_v3", 75)])
def test_torchvision_models_with_extra_heads(name, size):
    pytest.importorskip("torchvision")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        source = load_model(f"torchvision:{name}")
    assert source.input_shape is not None
    assert source.module.aux_logits
    assert isinstance(source.module(torch.zeros(1, 3, size, size)), torch.Tensor)


def test_torchvision_models_that_are_no_classifiers_download_nothing(monkeypatch):
    pytest.importorskip("torchvision")
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda *_a, **_k: pytest.fail("downloads"))
    segmentation = load_model("torchvision:lraspp_mobilenet_v3_large", num_classes=4)
    assert segmentation.input_shape == (1, 3, 520, 520)
    detection = load_model("torchvision:ssdlite320_mobilenet_v3_large")
    assert (detection.input_shape, detection.preprocessing) == (None, None)


def test_timm_model():
    pytest.importorskip("timm")
    source = load_model("timm:mobilenetv3_small_050", num_classes=3)
    assert source.input_shape == (1, 3, 224, 224)
    assert source.preprocessing == Preprocessing((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 256, 224)
    assert source.module(torch.zeros(1, 3, 64, 64)).shape == (1, 3)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("torchvision:resnet19", r"there is no 'resnet19'\. Did you mean .*resnet18"),
        ("timm:resnext50_32x4", "Did you mean .*resnext50_32x4d"),
        ("timm:hf-hub:somebody/something", "there is no 'hf-hub:somebody/something'"),
        ("timm:resnet18.nonsense", "Invalid pretrained tag"),
        ("convpare:resnet57", "Did you mean .*resnet56"),
        ("convpare:zzz", "Known: digits, mobilenet_v1_025, resnet110"),
        ("resnet18", "Valid forms: torchvision:NAME, timm:NAME, convpare:NAME, package.module:factory"),
        ("torchvision:", "Valid forms"),
        (":", "Valid forms"),
        ("", "Valid forms"),
        ("some/module:factory", "neither a module's dotted name nor a .py file"),
        ("torchvison:resnet18", "Did you mean torchvision:"),
        ("no_such_module_at_all:factory", "ModuleNotFoundError: No module named 'no_such_module_at_all'"),
        ("no/such/file.py:factory", r"the file no/such/file\.py does not exist"),
        ("torch.nn:Nope", "there is no 'Nope'"),
        ("torch:__version__", "__version__ is a .*; it must be a function or a class"),
        ("torch.nn:Linear", "TypeError"),
        ("builtins:dict", "returned a dict; it must return an nn.Module"),
    ],
)
def test_specs_that_are_refused(spec, message):
    if spec.startswith(("torchvision:r", "timm")):
        pytest.importorskip(spec.partition(":")[0])
    with pytest.raises(ConvpareError, match=message):
        load_model(spec)


def test_folder_is_no_model(tmp_path):
    with pytest.raises(ConvpareError, match="A folder is not a model"):
        load_model(str(tmp_path))


def test_num_classes_must_make_sense():
    with pytest.raises(ConvpareError, match="num_classes is 0"):
        load_model("convpare:resnet20", num_classes=0)
    with pytest.raises(ConvpareError, match="called without arguments"):
        load_model("torch.nn:ReLU", num_classes=3)


def test_builtin_specs():
    assert all(is_builtin(f"{prefix}:name") for prefix in ("torchvision", "timm", "convpare"))
    assert not any(
        is_builtin(spec) for spec in ("os:system", "x.py:f", "torchvision", "timm:", "torchvision.models:resnet18")
    )


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (RuntimeError("operator torchvision::nms does not exist"), "torchvision is installed for another torch build"),
        (ModuleNotFoundError("No module named 'torchvision'"), r"pip install convpare\[vision\]"),
    ],
)
@pytest.mark.parametrize("prefix", ["torchvision", "timm"])
def test_missing_or_broken_torchvision(monkeypatch, prefix, error, message):
    def fail(_name: str) -> None:
        raise error

    monkeypatch.setattr(importlib, "import_module", fail)
    with pytest.raises(ConvpareError, match=message):
        load_model(f"{prefix}:resnet18")


# ---------------------------------------------------------------- the user's factories


def test_factory_in_a_file_may_import_its_neighbours(tmp_path):
    (tmp_path / "neighbour_of_net.py").write_text("WIDTH = 3\n")
    (tmp_path / "net.py").write_text(
        "import torch\nfrom neighbour_of_net import WIDTH\n\n\n"
        "class Net(torch.nn.Linear):\n    pass\n\n\ndef make():\n    return Net(WIDTH, 2)\n"
    )
    path = list(sys.path)
    source = load_model(f"{tmp_path / 'net.py'}:make")
    assert tuple(source.module.weight.shape) == (2, 3)
    assert (source.input_shape, source.preprocessing) == (None, None)
    assert not source.module.training
    assert sys.path == path
    assert sys.modules[type(source.module).__module__].Net is type(source.module)
    del sys.modules["neighbour_of_net"]


def test_factory_in_a_module_of_the_working_folder(tmp_path, monkeypatch):
    (tmp_path / "module_in_cwd.py").write_text("import torch\nmake = torch.nn.Identity\n")
    monkeypatch.chdir(tmp_path)
    assert isinstance(load_model("module_in_cwd:make").module, nn.Identity)
    del sys.modules["module_in_cwd"]


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (
            "def make():\n    raise ValueError('the width is wrong')",
            "building .* failed: ValueError: the width is wrong",
        ),
        ("import not_there_at_all", "cannot be imported: ModuleNotFoundError: No module named 'not_there_at_all'"),
        ("def make(:", "cannot be imported: SyntaxError"),
        ("def make():\n    return 3", "returned a int"),
        ("def maker():\n    return 3", "there is no 'make'. Did you mean maker"),
    ],
)
def test_factories_that_fail(tmp_path, code, message):
    (tmp_path / "bad.py").write_text(code)
    path, modules = list(sys.path), set(sys.modules)
    with pytest.raises(ConvpareError, match=message):
        load_model(f"{tmp_path / 'bad.py'}:make")
    assert sys.path == path
    if "cannot be imported" in message:
        assert set(sys.modules) == modules


# ---------------------------------------------------------------- weights


@pytest.mark.parametrize(
    ("suffix", "wrap"),
    [
        (".pt", lambda state: state),
        (".pth", lambda state: {"state_dict": state, "epoch": 3}),
        (".pt", lambda state: {"model": state}),
        (".pt", lambda state: {f"module.{name}": value for name, value in state.items()}),
        (".pt", lambda state: {"state_dict": {f"module.{name}": value for name, value in state.items()}}),
        (".pt", lambda state: {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}),
    ],
)
def test_weights_in_torch_files(tmp_path, suffix, wrap):
    original, path = small(), tmp_path / f"weights{suffix}"
    torch.save(wrap(original.state_dict()), path)
    assert same(load_model("convpare:digits", weights=path).module, original)


def test_weights_in_safetensors(tmp_path):
    original, path = small(), tmp_path / "weights.safetensors"
    save_file({f"module.{k}": v for k, v in original.state_dict().items()}, path)
    assert same(load_model("convpare:digits", weights=str(path)).module, original)


def test_weights_that_do_not_fit(tmp_path):
    state = {f"x{n}.weight": torch.zeros(1) for n in range(4)} | small().state_dict()
    for name in list(state):
        if name.startswith("separable"):
            del state[name]
    state["fc.weight"], state["fc.bias"] = torch.zeros(3, 64), torch.zeros(3)
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(ConvpareError) as error:
        load_model("convpare:digits", weights=tmp_path / "w.pt")
    message = str(error.value)
    assert "10 missing: separable.0.weight, separable.1.weight, separable.1.bias, ..." in message
    assert "4 unexpected: x0.weight, x1.weight, x2.weight, ..." in message
    assert "2 of another shape: fc.weight is (3, 64), expected (10, 64), fc.bias is (3,), expected (10,)." in message
    assert "num_batches_tracked" not in message


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite(tmp_path, bad):
    state = small().state_dict()
    state["fc.weight"][3, 5] = bad
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(ConvpareError, match=r"fc\.weight holds NaN or infinity"):
        load_model("convpare:digits", weights=tmp_path / "w.pt")


class Hostile:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("plain_pickle", [False, True])
def test_pickles_with_code_are_never_run(tmp_path, plain_pickle):
    marker, path = tmp_path / "marker", tmp_path / "w.pth"
    if plain_pickle:
        path.write_bytes(pickle.dumps({"fc.weight": Hostile(marker)}, 2))
    else:
        torch.save({"fc.weight": Hostile(marker)}, path)
    with pytest.raises(ConvpareError, match="Pickles are never executed"):
        load_model("convpare:digits", weights=path)
    assert not marker.exists()


def test_damaged_and_foreign_files(tmp_path):
    torch.save(small().state_dict(), tmp_path / "whole.pt")
    save_file(small().state_dict(), tmp_path / "whole.safetensors")
    for suffix in (".pt", ".safetensors"):
        whole = (tmp_path / f"whole{suffix}").read_bytes()
        for content in (whole[: len(whole) // 2], whole[:20], b"", b"\x00" * 100, b"not weights at all"):
            path = tmp_path / f"damaged{suffix}"
            path.write_bytes(content)
            with pytest.raises(ConvpareError, match="damaged"):
                load_model("convpare:digits", weights=path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"epoch": 3}, "'epoch' is a int, not a tensor"),
        ([1, 2], "hold a list"),
        ({}, "hold a dict"),
        (torch.zeros(3), "hold a Tensor"),
        ({"state_dict": {"a": [1.0]}}, "'a' is a list, not a tensor"),
    ],
)
def test_files_without_a_state_dict(tmp_path, content, message):
    torch.save(content, tmp_path / "w.pt")
    with pytest.raises(ConvpareError, match=message):
        load_model("convpare:digits", weights=tmp_path / "w.pt")


def test_weights_of_no_known_kind(tmp_path):
    (tmp_path / "w.bin").write_bytes(b"x")
    with pytest.raises(ConvpareError, match=r"end in '\.bin'; expected \.safetensors, \.pt or \.pth"):
        load_model("convpare:digits", weights=tmp_path / "w.bin")
    with pytest.raises(ConvpareError, match="do not exist"):
        load_model("convpare:digits", weights=tmp_path / "nothing.pt")
