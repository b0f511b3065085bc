"""ONNX: the file computes what the network computes, or there is no file."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from small_nets import Awkward, Branch, Signals, digits, make
from torch import Tensor, nn

import convpare
from convpare.data import Preprocessing
from convpare.errors import ConvpareError
from convpare.export import OPSET, TOLERANCE, About, CheckOptions, Destination, export, export_int8, export_onnx
from convpare.export import onnx_file as module
from convpare.export.check import prepared
from convpare.planning.planner import calibration_images

X = torch.zeros(1, 1, 8, 8)


def noise(shape: tuple[int, ...], seed: int = 7) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def session(path: Path) -> Any:
    return onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])


def run(path: Path, x: Tensor) -> Tensor:
    return torch.from_numpy(session(path).run(None, {"input": x.numpy()})[0])


def perturbed(content: bytes, name: str, by: float = 3.0) -> bytes:
    """The same file with one weight changed."""
    model = onnx.load_from_string(content)
    (found,) = (x for x in model.graph.initializer if x.name == name)
    values = onnx.numpy_helper.to_array(found).copy()
    values.reshape(-1)[len(values.reshape(-1)) // 2] += by
    found.CopyFrom(onnx.numpy_helper.from_array(values, name))
    return bytes(model.SerializeToString())


@pytest.fixture(scope="module")
def contents() -> dict[str, bytes]:
    """What each exporter makes of the digits net."""
    net = digits()
    return {name: exporter(net, (X,), OPSET) for name, exporter in module.EXPORTERS.items()}


@pytest.fixture
def offered(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Exporters that give these contents."""

    def offer(**given: bytes) -> None:
        found = {name: lambda *_, content=content: content for name, content in given.items()}
        monkeypatch.setattr(module, "EXPORTERS", found)

    return offer


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("onnx") / "net.onnx"


def test_a_smaller_network_is_written_with_what_is_known_of_it(exported: Path):
    """Removals and batch sizes: the file is run by onnxruntime here, on other inputs than those of the check."""
    dense = digits()
    images = convpare.load_data("digits").train
    plan = convpare.plan(dense, X, images, macs=0.5, criterion="l2")
    small = convpare.apply(dense, plan)
    labels = tuple("zero one two three four five six seven eight nine".split())
    about = About(labels, Preprocessing((0.5,), (0.25,), crop=8), plan)
    small.train()
    state = torch.get_rng_state()
    found = export_onnx(small, X, exported, images, about=about)
    assert small.training and torch.equal(torch.get_rng_state(), state)
    small.eval()
    assert (found.exporter, found.opset, found.images, found.batches) == ("torch.export", OPSET, 64, (1, 9))
    assert not found.noise and found.tried == () and found.size == exported.stat().st_size
    assert 0 < found.difference < TOLERANCE / 10
    for batch in (1, 2, 31):
        x = noise((batch, 1, 8, 8))
        with torch.no_grad():
            torch.testing.assert_close(run(exported, x), small(x), rtol=1e-4, atol=1e-4)
    loaded = onnx.load(exported)
    onnx.checker.check_model(loaded)
    assert [(o.domain, o.version) for o in loaded.opset_import] == [("", OPSET)]
    props = {entry.key: entry.value for entry in loaded.metadata_props}
    assert props["convpare"] == convpare.__version__
    assert json.loads(props["labels"]) == list(labels)
    assert json.loads(props["preprocessing"]) == {"mean": [0.5], "std": [0.25], "resize": None, "crop": 8}
    assert json.loads(props["input"]) == [1, 8, 8]
    assert len(props["plan_sha256"]) == 64
    assert props["plan_sha256"] == about.to_json(X)["plan_sha256"]
    assert [f.name for f in exported.parent.iterdir()] == ["net.onnx"]


def test_other_plans_have_other_hashes():
    net = digits()
    one, other = (convpare.plan(net, X, macs=macs, criterion="l2") for macs in (0.9, 0.5))
    hashes = [About(plan=plan).to_json(X)["plan_sha256"] for plan in (one, other, one)]
    assert hashes[0] == hashes[2] != hashes[1]


@pytest.mark.parametrize("kind", [Signals, Awkward])
def test_other_kinds_of_networks(tmp_path: Path, kind: type[Any]):
    """`Awkward` takes the size of the batch by `len`, which becomes a number for torch.export and TorchScript: the
    captured graph, in which it follows the input, is what is written."""
    net = make(kind)
    found = export_onnx(net, kind.example, tmp_path / "net.onnx")
    assert found.noise and found.images == 10 and found.difference <= TOLERANCE
    x = noise((5, *kind.example.shape[1:]))
    with torch.no_grad():
        torch.testing.assert_close(run(tmp_path / "net.onnx", x), net(x), rtol=1e-3, atol=1e-4)


def test_what_cannot_be_exported_is_said_by_every_exporter(tmp_path: Path):
    with pytest.raises(ConvpareError, match="Branch was not exported to ONNX, nothing was written") as error:
        export_onnx(make(Branch), torch.zeros(1, 3, 8, 8), tmp_path / "net.onnx")
    assert str(error.value).count("torch.export: ") == 1
    assert "TorchScript: its forward branches on values, and a trace would hold one branch alone" in str(error.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("layer", ["stem.0", "block1.conv2", "separable.0", "block2.conv2", "fc"])
@pytest.mark.parametrize("exporter", ["torch.export", "TorchScript"])
def test_a_wrong_file_is_caught_and_the_layer_named(
    tmp_path: Path, contents: dict[str, bytes], offered: Any, exporter: str, layer: str
):
    """One weight is changed where batch norms were folded in, in either exporter's file."""
    content = contents[exporter]
    if exporter == "TorchScript" and layer != "fc":  # its initializers have numbers for names, in order
        convs = [n for n in onnx.load_from_string(content).graph.node if n.op_type == "Conv"]
        order = ["stem.0", "block1.conv1", "block1.conv2", "separable.0", "separable.3", "block2.conv1", "block2.conv2"]
        name = convs[order.index(layer)].input[1]
    else:
        name = f"{layer}.weight"
    (tmp_path / "net.onnx").write_bytes(b"old")
    offered(one=perturbed(content, name))
    with pytest.raises(ConvpareError, match=r"differ from torch's by \d") as error:
        export_onnx(digits(), X, tmp_path / "net.onnx")
    assert f"they part at '{layer}' (aten." in str(error.value)
    assert [(f.name, f.read_bytes()) for f in tmp_path.iterdir()] == [("net.onnx", b"old")]


def test_the_second_exporter_is_taken_where_the_first_is_wrong(
    tmp_path: Path, contents: dict[str, bytes], offered: Any
):
    offered(first=perturbed(contents["torch.export"], "fc.bias"), second=contents["TorchScript"])
    found = export_onnx(digits(), X, tmp_path / "net.onnx")
    assert found.exporter == "second"
    assert len(found.tried) == 1 and found.tried[0].startswith("first: onnxruntime's outputs differ")
    x = noise((4, 1, 8, 8))
    with torch.no_grad():
        torch.testing.assert_close(run(tmp_path / "net.onnx", x), digits()(x), rtol=1e-4, atol=1e-4)


def test_a_file_for_one_batch_size_is_no_file(tmp_path: Path, offered: Any):
    net = digits()
    offered(one=module.onnx_of(net, (X,), opset_version=OPSET))
    with pytest.raises(ConvpareError, match="it does not run on a batch of 9"):
        export_onnx(net, X, tmp_path / "net.onnx")
    assert not list(tmp_path.iterdir())


def test_two_inputs_and_two_outputs(tmp_path: Path):
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 3), nn.Linear(5, 4)

        def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            z = self.a(x) + self.b(y)[:, :, None, None]
            return z, z.mean((2, 3))

    torch.manual_seed(0)
    net = Two()
    found = export_onnx(net, (torch.zeros(1, 3, 6, 6), torch.zeros(1, 5)), tmp_path / "two.onnx")
    assert found.noise
    entries = session(tmp_path / "two.onnx")
    assert [i.name for i in entries.get_inputs()] == ["input_0", "input_1"]
    assert [o.name for o in entries.get_outputs()] == ["output_0", "output_1"]
    x, y = noise((3, 3, 6, 6)), noise((3, 5))
    got = entries.run(None, {"input_0": x.numpy(), "input_1": y.numpy()})
    with torch.no_grad():
        for mine, its in zip(net(x, y), got, strict=True):
            torch.testing.assert_close(torch.from_numpy(its), mine, rtol=1e-4, atol=1e-5)
    with pytest.raises(ConvpareError, match="takes 2 inputs, and images are one"):
        export_onnx(net, (torch.zeros(1, 3, 6, 6), torch.zeros(1, 5)), tmp_path / "x.onnx", noise((4, 3, 6, 6)))


def test_a_graph_form_and_chains(tmp_path: Path):
    net = digits()
    images = convpare.load_data("digits").train
    options = convpare.PlanOptions(methods=("prune", "factorize"), images=64)
    chains = convpare.apply(net, convpare.plan(net, X, images, macs=0.5, criterion="reconstruction", options=options))
    removal = convpare.plan(net, X, macs=0.5, criterion="l2")
    for model in (chains, convpare.apply(net, removal, form="graph")):
        found = export_onnx(model, X, tmp_path / "net.onnx", images)
        assert found.difference < TOLERANCE
        x = noise((2, 1, 8, 8))
        with torch.no_grad():
            torch.testing.assert_close(run(tmp_path / "net.onnx", x), model(x), rtol=1e-3, atol=1e-4)


# ------------------------------------------------------------------------------------------------------- the check


def test_what_the_check_compares():
    net = digits()
    images = noise((20, 1, 8, 8))
    check = prepared(net, X, images, CheckOptions(images=12))
    assert (check.images, check.sizes, check.noise) == (12, (1, 9, 2), False)
    assert prepared(net, X, images[:1], CheckOptions()).sizes == (1, 1)
    with torch.no_grad():
        assert check.difference(lambda inputs: [net(*inputs)]) < 1e-6
        scale = max(float(net(*inputs).abs().max()) for inputs in check.batches)
        off = check.difference(lambda inputs: [net(*inputs) + 0.5 * (len(inputs[0]) == 2)])
        assert off == pytest.approx(0.5 / scale, rel=1e-5)
        assert np.isnan(check.difference(lambda inputs: [net(*inputs) * float("nan")]))
        with pytest.raises(ConvpareError, match=r"it puts out .* where torch puts out"):
            check.difference(lambda inputs: [net(*inputs)[:, :3]])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"tolerance": 0.0}, "tolerance is 0.0"),
        ({"tolerance": float("nan")}, "tolerance is nan"),
        ({"images": 1}, "images is 1; a check needs 2 or more"),
    ],
)
def test_options_that_make_no_sense(given: dict[str, Any], message: str):
    with pytest.raises(ConvpareError, match=message):
        CheckOptions(**given)


def test_places_and_networks_that_cannot_be(tmp_path: Path):
    net = digits()
    with pytest.raises(ConvpareError, match="is a folder; give the name of a file"):
        export_onnx(net, X, tmp_path)
    with pytest.raises(ConvpareError, match=r"there is no folder .*nowhere; make it first"):
        export_onnx(net, X, tmp_path / "nowhere" / "net.onnx")
    with pytest.raises(ConvpareError, match=r"there are 3 labels for outputs of \(10,\)"):
        export_onnx(net, X, tmp_path / "net.onnx", about=About(("a", "b", "c")))
    with pytest.raises(ConvpareError, match="does not run on images of 3×8×8"):
        export_onnx(net, torch.zeros(1, 3, 8, 8), tmp_path / "net.onnx")
    with torch.no_grad():
        net.fc.bias[0] = float("nan")
    with pytest.raises(ConvpareError, match="NaN or infinity"):
        export_onnx(net, X, tmp_path / "net.onnx")
    with pytest.raises(ConvpareError, match="no form 'tflite'; choose one of onnx, pt2, torch"):
        Destination("tflite", tmp_path / "net")
    with pytest.raises(ConvpareError, match="int8 is a second ONNX file"):
        Destination("pt2", tmp_path / "net.pt2", int8=True)
    with pytest.raises(ConvpareError, match="int8 takes the ranges of activations from images"):
        export(net, X, Destination("onnx", tmp_path / "net.onnx", int8=True))
    assert not list(tmp_path.iterdir())


# -------------------------------------------------------------------------------------------------------------- int8


def test_int8(tmp_path: Path, contents: dict[str, bytes]):
    """Weights in int8 with a scale for each channel, the metadata of the float file, and outputs near to its own."""
    images = convpare.load_data("digits").train.tensor()
    source, path = tmp_path / "net.onnx", tmp_path / "net.int8.onnx"
    source.write_bytes(module.with_metadata(contents["torch.export"], {"convpare": "x", "labels": ["a"]}))
    found = export_int8(source, path, images, options=CheckOptions(images=100), calibration=32)
    assert (found.kind, found.images, found.opset) == ("int8", 100, OPSET)
    loaded = onnx.load(path)
    assert {entry.key: entry.value for entry in loaded.metadata_props}["labels"] == '["a"]'
    weights = {x.name: onnx.numpy_helper.to_array(x) for x in loaded.graph.initializer}
    int8 = [x for x in weights.values() if x.dtype == np.int8 and x.ndim == 4]
    assert len(int8) == 7
    dequantized = [n for n in loaded.graph.node if n.op_type == "DequantizeLinear" and n.input[0] in weights]
    assert sum(weights[n.input[1]].size > 1 for n in dequantized) >= 7
    compared = calibration_images(images, 132, 0)[32:]
    expected, got = run(source, compared), run(path, compared)
    assert float((expected - got).norm() / expected.norm()) == pytest.approx(found.error, rel=1e-2)
    assert 100 * float((expected.argmax(1) == got.argmax(1)).float().mean()) == pytest.approx(found.agreement, abs=3)
    assert 0 < found.error < 0.1
    assert sorted(f.name for f in tmp_path.iterdir()) == ["net.int8.onnx", "net.onnx"]


def test_int8_needs_a_file_and_images(tmp_path: Path):
    images = noise((4, 1, 8, 8))
    with pytest.raises(ConvpareError, match=r"there is no file .*; int8 starts from an ONNX file"):
        export_int8(tmp_path / "none.onnx", tmp_path / "net.onnx", images)
    (tmp_path / "bad.onnx").write_bytes(b"no model")
    with pytest.raises(ConvpareError, match="onnxruntime cannot load the model"):
        export_int8(tmp_path / "bad.onnx", tmp_path / "net.onnx", images)
    with pytest.raises(ConvpareError, match="int8 needs images"):
        export_int8(tmp_path / "bad.onnx", tmp_path / "net.onnx", images[:0])
    assert [f.name for f in tmp_path.iterdir()] == ["bad.onnx"]


def test_an_interruption_leaves_what_was_there(
    tmp_path: Path, contents: dict[str, bytes], offered: Any, monkeypatch: pytest.MonkeyPatch
):
    def interrupted(*_: object) -> float:
        assert len(list(tmp_path.iterdir())) == 2  # the old file, and the new one under another name
        raise KeyboardInterrupt

    (tmp_path / "net.onnx").write_bytes(b"old")
    offered(one=contents["torch.export"])
    monkeypatch.setattr(module, "checked", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export_onnx(digits(), X, tmp_path / "net.onnx")
    assert [(f.name, f.read_bytes()) for f in tmp_path.iterdir()] == [("net.onnx", b"old")]
