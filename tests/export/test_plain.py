"""`.pt2` and plain PyTorch: files that a process without convpare runs, and trains."""

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_nets import Awkward, Branch, Signals, digits, make
from torch import Tensor, fx, nn

import convpare
from convpare.errors import ConvpareError
from convpare.export import About, export_pt2, export_torch
from convpare.export import folder as folder_module
from convpare.export import program as program_module
from convpare.export.code import Written, written
from convpare.export.folder import loaded
from convpare.export.plain import plain_form
from convpare.export.program import EXTRA
from convpare.export.spelling import call, quoted, value

X = torch.zeros(1, 1, 8, 8)


def noise(shape: tuple[int, ...], seed: int = 7) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def code_of(net: nn.Module, example: Tensor) -> tuple[nn.Module, Written]:
    """The network from its code, in this process."""
    made = written(plain_form(net, (example,)), "Network")
    names: dict[str, Any] = {"torch": torch, "nn": nn, "F": torch.nn.functional}
    exec(made.code, names)
    again: nn.Module = names["Network"]()
    again.load_state_dict(made.state)
    return again, made


def assert_alike(a: nn.Module, b: nn.Module, x: Tensor) -> None:
    """In both modes: outputs, the gradient of the input, and what batch norms learn meanwhile."""
    for training in (False, True):
        results = []
        for net in (a, b):
            net.train(training)
            torch.manual_seed(5)
            leaf = x.clone().requires_grad_()
            y = net(leaf)
            (gradient,) = torch.autograd.grad(y.square().sum(), leaf)
            learnt = [m.running_mean for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
            results.append([y.detach(), gradient, *(m.clone() for m in learnt if m is not None)])
        for mine, its in zip(*results, strict=True):
            torch.testing.assert_close(its, mine, rtol=1e-4, atol=1e-5)


# -------------------------------------------------------------------------------------------------- the generated code


def test_code_reads_like_code_and_trains():
    again, made = code_of(digits(), X)
    assert "self.stem_0 = nn.Conv2d(1, 32, 3, padding=1, bias=False)\n" in made.code
    assert "self.separable_0 = nn.Conv2d(32, 32, 3, stride=2, padding=1, groups=32, bias=False)\n" in made.code
    assert "        y = self.block1_bn2(y)\n        x = y + x\n        x = F.relu(x)\n" in made.code
    assert "torch.ops" not in made.code
    assert {type(m) for m in again.modules()} == {type(again), nn.Conv2d, nn.BatchNorm2d, nn.Linear}
    assert_alike(digits(), again, noise((6, 1, 8, 8)))


@pytest.mark.parametrize(("kind", "lines"), [
    (Signals, [
        "self.features_3 = nn.Conv1d(16, 24, 3, groups=4, bias=False)",
        "self.features_5 = nn.ConvTranspose1d(24, 24, 3, groups=24)",
        "self.features_6 = nn.BatchNorm1d(24, eps=0.001)", "x = self.dropout_0(x)",
        "self.features_2 = nn.PReLU(16)", "self.features_4 = nn.PReLU(1)",
    ]),
    (Awkward, [
        "self.x = nn.Conv2d(8, 8, (1, 3), padding=(0, 1), bias=False)", "self.a_b = nn.GroupNorm(2, 8)",
        "self.a_b_2 = nn.LayerNorm(8, eps=1e-06)", "self.dropout_0 = nn.Dropout2d(0.4)",
        "self.scale = nn.Parameter(torch.zeros([6, 1, 1], dtype=torch.float32))", "y = x[:, 3:]",
        "batch = given.shape[0]",
    ]),
])  # fmt: skip
def test_other_kinds_of_networks(kind: type[Any], lines: list[str]):
    net = make(kind)
    again, made = code_of(net, kind.example)
    assert all(line in made.code for line in lines), made.code
    x = noise((6, *kind.example.shape[1:]))
    if kind is Signals:
        assert_alike(net, again, x)
        return
    with torch.no_grad():  # its computed weight is folded, so that it trains as a plain convolution
        torch.testing.assert_close(again.eval()(x), net(x), rtol=1e-4, atol=1e-5)
    assert not torch.equal(again.train()(x), again.eval()(x))


def test_one_layer_in_two_ways_tied_tensors_and_types():
    """A kernel that is read with two strides is no layer; one tensor under two names stays one."""

    class Ways(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.first = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
            self.second = nn.BatchNorm2d(3)
            self.second.weight = self.first.weight

        def forward(self, x: Tensor) -> dict[str, Any]:
            y = nn.functional.conv2d(self.first(self.conv(x)), self.conv.weight, stride=2)
            return {"maps": (y, [self.second(y)]), "one": torch.clamp(y, max=float("inf")).to(torch.float32)}

    net = make(Ways).double()
    x = noise((3, 3, 8, 8)).double()
    again, made = code_of(net, x)
    assert "F.conv2d(x, self.conv_weight, self.conv_bias" in made.code.replace("given", "x")
    assert "self.second.weight = self.first.weight\n" in made.code
    assert "dtype=torch.float64" in made.code
    assert again.second.weight is again.first.weight  # type: ignore[union-attr]
    with torch.no_grad():
        mine, its = net(x), again.eval()(x)
    assert list(its) == ["maps", "one"] and isinstance(its["maps"], tuple) and isinstance(its["maps"][1], list)
    torch.testing.assert_close(its["maps"][0], mine["maps"][0])
    torch.testing.assert_close(its["maps"][1][0], mine["maps"][1][0])
    torch.testing.assert_close(its["one"], mine["one"])


def test_every_operator_is_spelled_as_what_it_is():
    """What `spelling` writes computes what the operator computes."""
    x = noise((2, 4, 6, 6)).abs() + 0.1
    names = {"torch": torch, "F": torch.nn.functional, "x": x, "nan": float("nan"), "inf": float("inf")}
    aten = torch.ops.aten
    cases: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = [
        (aten.hardtanh.default, (x, 0.2, 0.9), {}), (aten.gelu.default, (x,), {"approximate": "tanh"}),
        (aten.leaky_relu.default, (x, 0.3), {}), (aten.softmax.int, (x, 1), {}), (aten.mish.default, (x,), {}),
        (aten.max_pool2d.default, (x, [3, 3], [2, 2], [1, 1], [1, 1], True), {}),
        (aten.avg_pool2d.default, (x, [3, 3], [2, 2], [1, 1], False, False), {}),
        (aten.pad.default, (x, [1, 2, 0, 1], "constant", 2.0), {}), (aten.mean.dim, (x, [2, 3], True), {}),
        (aten.slice.Tensor, (x, 2, 1, 2**63 - 1), {}), (aten.slice.Tensor, (x, 1, 0, 3), {}),
        (aten.slice.Tensor, (x, 1, 0, 4, 2), {}), (aten.slice.Tensor, (x, -1, 1, 3), {}), (aten.slice.Tensor, (x,), {}),
        (aten.select.int, (x, 1, -1), {}), (aten.add.Tensor, (x, x), {"alpha": 2}), (aten.div.Tensor, (x, x), {}),
        (aten.clamp.default, (x, 0.2, None), {}), (aten.alias.default, (x,), {}),
        (aten.split_with_sizes.default, (x, [1, 3], 1), {}), (aten.leaky_relu_.default, (-x, 0.3), {}),
        (aten.flatten.using_ints, (x, 1), {}),
        (aten.expand.default, (x[:, :1], [2, 4, 6, 6]), {}), (aten.sym_size.int, (x, 2), {}),
        (aten.to.dtype, (x, torch.float64), {}), (aten.upsample_nearest2d.vec, (x, [3, 3], None), {}),
    ]  # fmt: skip
    for operator, args, kwargs in cases:

        def spell(given: Any) -> str:
            if isinstance(given, Tensor):
                return {4: "x", 1: "x[:, :1]"}[given.shape[1]] if given.min() > 0 else "(-x)"
            return value(given, str)

        text = call(str(operator), args, kwargs, spell)
        expected, got = operator(*args, **kwargs), eval(text, dict(names))
        for mine, its in zip(*([x] if isinstance(x, Tensor | int) else x for x in (expected, got)), strict=True):
            assert torch.equal(mine, its) if isinstance(mine, Tensor) else mine == its, text


def test_values_are_spelled():
    for given in (
        None,
        True,
        -3,
        0.1,
        1e-300,
        float("inf"),
        "a\"b\\c'\n€",
        [1, [2.5, None]],
        (1,),
        (1, "x"),
        {"a": [1]},
    ):
        assert eval(value(given, str)) == given
    assert str(eval(value(float("nan"), str))) == "nan"
    assert eval(value(torch.channels_last, str), {"torch": torch}) is torch.channels_last
    assert quoted('"); import os #') == '"\\"); import os #"'
    with pytest.raises(ConvpareError, match="has a complex among its arguments"):
        value(1j, str)


def test_names_that_are_alike():
    """Dots become underscores, and two names stay two."""
    root = nn.Module()
    root.a_b, root.a = nn.Parameter(torch.ones(1)), nn.Module()
    root.a.b = nn.Parameter(torch.full((1,), 2.0))
    root.forward_ = nn.Parameter(torch.full((1,), 3.0))
    graph = fx.Graph()
    x = graph.placeholder("F")
    for name in ("a_b", "a.b", "forward_"):
        x = graph.call_function(torch.ops.aten.mul.Tensor, (x, graph.get_attr(name)))
    graph.output(x)
    made = written(fx.GraphModule(root, graph), "Network")
    names: dict[str, Any] = {"torch": torch, "nn": nn, "F": torch.nn.functional}
    exec(made.code, names)
    net = names["Network"]()
    net.load_state_dict(made.state)
    assert set(made.state) == {"a_b", "a_b_2", "forward_"}
    assert net(torch.tensor([5.0])).item() == 30.0


# --------------------------------------------------------------------------------------------------------- the files

SCRIPT = """
import importlib.abc
import sys

class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "convpare":
            raise ImportError("there is no convpare here")

sys.meta_path.insert(0, Blocked())
try:
    import convpare
except ImportError as error:
    assert str(error) == "there is no convpare here"
import torch

folder, program, given, found = sys.argv[1:]
sys.path.insert(0, folder)
sys.dont_write_bytecode = True
import model

x = torch.load(given, weights_only=True)
net = model.load()
assert not net.training
with torch.no_grad():
    outputs = [net(x), torch.export.load(program).module()(x)]
net.train()
optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
labels = torch.arange(len(x)) % 10
losses = []
for _ in range(20):
    loss = torch.nn.functional.cross_entropy(net(x), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
assert losses[-1] < 0.5 * losses[0], losses
torch.save({"outputs": outputs, "about": model.ABOUT}, found)
"""


def test_a_process_without_convpare_runs_and_trains_what_was_exported(tmp_path: Path):
    dense = digits()
    images = convpare.load_data("digits").train
    plan = convpare.plan(dense, X, images, macs=0.6, criterion="l2")
    small = convpare.apply(dense, plan)
    about = About(tuple("zero one two three four five six seven eight \"nine'".split()), plan=plan)
    folder = export_torch(small, X, tmp_path / "net", images, about=about)
    program = export_pt2(small, X, tmp_path / "net.pt2", images, about=about)
    assert (folder.difference, program.difference) == (pytest.approx(0, abs=1e-6), pytest.approx(0, abs=1e-6))
    assert sorted(f.name for f in (tmp_path / "net").iterdir()) == ["model.py", "weights.pt"]
    assert folder.size == sum(f.stat().st_size for f in (tmp_path / "net").iterdir())
    x = noise((7, 1, 8, 8))
    torch.save(x, tmp_path / "given")
    command = [sys.executable, "-c", SCRIPT, *(str(tmp_path / name) for name in ("net", "net.pt2", "given", "found"))]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = torch.load(tmp_path / "found", weights_only=True)
    with torch.no_grad():
        for got in found["outputs"]:
            torch.testing.assert_close(got, small(x), rtol=1e-5, atol=1e-5)
    assert found["about"] == about.to_json(X)
    assert found["about"]["labels"][-1] == "\"nine'"
    extra = {EXTRA: ""}
    torch.export.load(tmp_path / "net.pt2", extra_files=extra)
    assert json.loads(extra[EXTRA]) == about.to_json(X)


def test_numbers_that_follow_the_batch_only_in_the_captured_graph(tmp_path: Path):
    net = make(Awkward)
    found = export_pt2(net, Awkward.example, tmp_path / "net.pt2")
    assert found.exporter == "torch.export of the captured graph"
    assert found.tried[0].startswith("torch.export: torch.export cannot capture Awkward for batches of any size")
    run = torch.export.load(tmp_path / "net.pt2").module()
    x = noise((5, 3, 8, 8))
    with torch.no_grad():
        torch.testing.assert_close(run(x), net(x), rtol=1e-4, atol=1e-5)


def test_the_model_is_left_as_it_was(tmp_path: Path):
    net = digits().train()
    net.fc.eval()  # type: ignore[union-attr]
    before = copy.deepcopy(net.state_dict())
    state = torch.get_rng_state()
    export_torch(net, X, tmp_path / "net")
    assert net.training and not net.fc.training  # type: ignore[union-attr]
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(x, before[name]) for name, x in net.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in net.parameters())


def test_a_saved_graph_form_and_chains(tmp_path: Path):
    """A graph form that was saved and loaded holds no more of the network than the export does."""
    net = digits()
    removal = convpare.plan(net, X, macs=0.5, criterion="l2")
    convpare.save(convpare.apply(net, removal, form="graph"), tmp_path / "artifact")
    images = convpare.load_data("digits").train
    options = convpare.PlanOptions(methods=("prune", "factorize"), images=64)
    mixed = convpare.plan(net, X, images, macs=0.4, criterion="reconstruction", options=options)
    assert mixed.factorizations
    for model in (convpare.load(tmp_path / "artifact"), convpare.apply(net, mixed)):
        again, _ = code_of(model, X)
        assert_alike(model, again, noise((5, 1, 8, 8)))
    artifact = convpare.load_artifact(tmp_path / "artifact")
    export_torch(artifact.module, X, tmp_path / "net", about=About(plan=artifact.plan))
    assert "class DigitsNet(nn.Module):" in (tmp_path / "net" / "model.py").read_text()
    x = noise((3, 1, 8, 8))
    with torch.no_grad():
        torch.testing.assert_close(loaded(tmp_path / "net")(x), artifact.module(x))


# ------------------------------------------------------------------------------------------------------ what goes wrong

Verb = Callable[..., object]


@pytest.mark.parametrize(("verb", "name"), [(export_torch, "net"), (export_pt2, "net.pt2")])
def test_a_wrong_export_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: Verb, name: str):
    """What the other process computes is what is compared."""
    net = digits()
    place = tmp_path / name
    if verb is export_torch:
        place.mkdir()
        (place / "model.py").write_text("old")
    else:
        place.write_bytes(b"old")

    def elsewhere(load: str, path: Path, batches: Any) -> list[list[Tensor]]:
        assert path.exists() and path != place
        with torch.no_grad():
            return [[net(*inputs) + 0.01] for inputs in batches]

    for module in (folder_module, program_module):
        monkeypatch.setattr(module, "outputs_elsewhere", elsewhere)
    with pytest.raises(ConvpareError, match=r"outputs differ from the network's by .* nothing was written"):
        verb(net, X, place)
    assert (place.read_bytes() if place.is_file() else (place / "model.py").read_bytes()) == b"old"
    assert [f.name for f in tmp_path.iterdir()] == [name]


def test_code_that_does_not_run_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(folder_module, "written", lambda net, name: Written("import convpare\n", {}))
    with pytest.raises(ConvpareError, match=r"does not run in a process without convpare: .*convpare"):
        export_torch(digits(), X, tmp_path / "net")
    assert not list(tmp_path.iterdir())


def test_places_that_cannot_be(tmp_path: Path):
    net = digits()
    (tmp_path / "file").write_text("mine")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("years of work")
    for place, message in (
        ("file", "is a file; give the name of a folder"), ("thesis", "holds 'thesis.tex', which would be lost"),
        ("nowhere/net", "there is no folder .*nowhere; make it first"), ("file/net", "there is no folder"),
    ):  # fmt: skip
        with pytest.raises(ConvpareError, match=message):
            export_torch(net, X, tmp_path / place)
    for kind, example in ((Branch, torch.zeros(1, 3, 8, 8)),):
        with pytest.raises(ConvpareError, match="capture"):
            export_torch(make(kind), example, tmp_path / "net")
        with pytest.raises(ConvpareError, match="Branch was not exported"):
            export_pt2(make(kind), example, tmp_path / "net.pt2")
    assert sorted(str(f.relative_to(tmp_path)) for f in tmp_path.rglob("*")) == ["file", "thesis", "thesis/thesis.tex"]
    assert (tmp_path / "file").read_text() == "mine"


def test_modules_named_by_words_of_python():
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.add_module("class", nn.Conv2d(3, 4, 3))

        def forward(self, x: Tensor) -> Tensor:
            return self._modules["class"](x)  # type: ignore[misc]

    with pytest.raises(ConvpareError, match=r"named by a word of Python's \(.*self\.class"):
        plain_form(Words(), (torch.zeros(1, 3, 8, 8),))


def test_unwritable_places_leave_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(ConvpareError, match=r"net cannot be written: .*No space left on device"):
        export_torch(digits(), X, tmp_path / "net")
    assert not list(tmp_path.iterdir())
