"""What can be made good is made good exactly; what cannot is fitted as NumPy fits it; all else stays as it was."""

import copy
import itertools
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convpare.errors import ConvpareError
from convpare.graph import Graph, removed, trace
from convpare.recovery import LeastSquares, compensate_, least_squares
from convpare.recovery.least_squares import Fitted

EXACT = LeastSquares(ridge=1e-9, least_samples=10**6)


class Net(nn.Module):
    """Modules by name, and a forward that takes them as its first argument."""

    def __init__(self, forward: Callable[..., object], **parts: nn.Module) -> None:
        super().__init__()
        self.run = forward
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, *inputs: Tensor) -> object:
        return self.run(self, *inputs)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_mean is not None:
                for tensor, low, high in (
                    (m.weight, 0.5, 1.5), (m.bias, -0.3, 0.3), (m.running_mean, -0.3, 0.3), (m.running_var, 0.5, 1.5)
                ):  # fmt: skip
                    if tensor is not None:
                        tensor.copy_(torch.rand(tensor.shape, generator=generator) * (high - low) + low)
    return model.eval()


def pruned(teacher: nn.Module, x: Tensor, gone: dict[str, list[int]]) -> tuple[nn.Module, Graph, np.ndarray]:
    """The network without these channels, and the graph and mask that say so."""
    graph = trace(teacher, x[:2])
    keep = graph.keep_all()
    for name, channels in gone.items():
        keep[graph.group(name).start + np.array(channels)] = False
    return removed(teacher, graph, keep), graph, keep


def recovered(
    teacher: nn.Module, x: Tensor, gone: dict[str, list[int]], options: LeastSquares = EXACT
) -> tuple[nn.Module, nn.Module, Fitted]:
    """The network after surgery, and the same after compensation."""
    small, graph, keep = pruned(teacher, x, gone)
    student = copy.deepcopy(small)
    return small, student, compensate_(student, teacher, graph, keep, x, options)


def relative(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


def output(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x)


# ---------------------------------------------------------------------------------------------------------- exactness


def twins(layer: nn.Module, a: int = 1, b: int = 4) -> None:
    with torch.no_grad():
        for tensor in (layer.weight, layer.bias):
            tensor[b] = tensor[a]


def _conv(*args: int, kind: type[nn.Module] = nn.Conv2d, **options: object) -> Callable[[], nn.Module]:
    return partial(kind, *args, **options)


CONSUMERS: dict[str, Callable[[], nn.Module]] = {
    "plain": _conv(8, 5, 3),
    "without bias": _conv(8, 5, 3, bias=False),
    "stride": _conv(8, 5, (3, 2), stride=(2, 1), padding=(1, 0)),
    "dilation": _conv(8, 5, 3, dilation=2, padding=2),
    "same": _conv(8, 5, 4, padding="same"),
    "same and dilated": _conv(8, 5, 2, padding="same", dilation=3, bias=False),
    "circular": _conv(8, 5, 3, padding=1, padding_mode="circular"),
    "pointwise": _conv(8, 5, 1),
    "batch norm": lambda: nn.Sequential(nn.Conv2d(8, 5, 3, bias=False), nn.BatchNorm2d(5)),
    "bias and batch norm": lambda: nn.Sequential(nn.Conv2d(8, 5, 3), nn.BatchNorm2d(5, affine=False)),
    "batch norm and rectifier": lambda: nn.Sequential(
        nn.Conv2d(8, 5, 3, bias=False), nn.BatchNorm2d(5), nn.ReLU(inplace=True), nn.Conv2d(5, 2, 1)
    ),
    "rectifier": lambda: nn.Sequential(nn.Conv2d(8, 5, 3), nn.ReLU6(), nn.Dropout(), nn.Conv2d(5, 2, 1)),
    "batch statistics": lambda: nn.Sequential(nn.Conv2d(8, 5, 3), nn.BatchNorm2d(5, track_running_stats=False)),
    "linear": lambda: nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)),
    "linear, flattened": lambda: nn.Sequential(nn.MaxPool2d(3), nn.Flatten(), nn.Linear(8 * 4, 3), nn.BatchNorm1d(3)),
}


@pytest.mark.parametrize("name", CONSUMERS)
def test_a_twins_removal_is_made_good(name: str):
    torch.manual_seed(0)
    front = nn.Conv2d(3, 8, 3, padding=1)
    twins(front)
    teacher = randomise(nn.Sequential(front, nn.BatchNorm2d(8), nn.Sigmoid(), CONSUMERS[name]()))
    with torch.no_grad():
        for tensor in (teacher[1].weight, teacher[1].bias, teacher[1].running_mean, teacher[1].running_var):
            tensor[4] = tensor[1]
    x = noise(100, 3, 7, 7)
    small, student, fitted = recovered(teacher, x, {"0": [4]})
    fresh = noise(20, 3, 7, 7, seed=9)
    expected = output(teacher, fresh)
    assert relative(output(small, fresh), expected) > 1e-2
    assert relative(output(student, fresh), expected) < 1e-4
    assert fitted.kept == {}
    assert fitted.layers[0].startswith("3")


def test_grouped_and_depthwise_layers():
    torch.manual_seed(0)
    teacher = randomise(
        nn.Sequential(
            nn.Conv2d(3, 16, 3), nn.Sigmoid(), nn.Conv2d(16, 12, 3, groups=2, bias=False), nn.BatchNorm2d(12),
            nn.Sigmoid(), nn.Conv2d(12, 8, 1), nn.Sigmoid(), nn.Conv2d(8, 8, 3, groups=8), nn.BatchNorm2d(8),
            nn.Sigmoid(), nn.Conv2d(8, 4, 1),
        )
    )  # fmt: skip
    with torch.no_grad():
        for layer, a, b in ((teacher[0], 1, 4), (teacher[0], 9, 12), (teacher[5], 2, 7), (teacher[7], 2, 7)):
            layer.weight[b], layer.bias[b] = layer.weight[a], layer.bias[a]
        norm = teacher[8]
        for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
            tensor[7] = tensor[2]
    x = noise(80, 3, 9, 9)
    small, student, fitted = recovered(teacher, x, {"0": [4], "5": [7]})
    assert student[2].weight.shape == (12, 7, 3, 3)
    assert student[7].groups == 7
    assert fitted.layers == ("2", "5", "7", "10")
    fresh = noise(20, 3, 9, 9, seed=9)
    assert relative(output(small, fresh), output(teacher, fresh)) > 1e-2
    assert relative(output(student, fresh), output(teacher, fresh)) < 1e-4


@pytest.mark.parametrize("axes", [1, 3])
def test_one_and_three_axes(axes: int):
    conv = {1: nn.Conv1d, 3: nn.Conv3d}[axes]
    norm = {1: nn.BatchNorm1d, 3: nn.BatchNorm3d}[axes]
    torch.manual_seed(0)
    front = conv(2, 6, 3, padding=1)
    twins(front)
    teacher = randomise(
        nn.Sequential(front, nn.Sigmoid(), conv(6, 4, 3, stride=2, padding=1), norm(4), nn.ReLU(), conv(4, 2, 1))
    )
    x = noise(120, 2, *(6,) * axes)
    small, student, _ = recovered(teacher, x, {"0": [4]})
    fresh = noise(20, 2, *(6,) * axes, seed=9)
    assert relative(output(small, fresh), output(teacher, fresh)) > 1e-2
    assert relative(output(student, fresh), output(teacher, fresh)) < 1e-4


def test_linear_layers_over_positions():
    """Channels last: the linear layer's channels are on the last axis, and a batch norm of another is not folded."""

    def forward(net: Net, x: Tensor) -> Tensor:
        y = torch.sigmoid(net.first(x)).permute(0, 2, 3, 1).flatten(1, 2)
        return net.last(torch.sigmoid(net.norm(net.mix(y))))

    torch.manual_seed(0)
    first = nn.Conv2d(3, 6, 3)
    twins(first)
    teacher = randomise(Net(forward, first=first, mix=nn.Linear(6, 25), norm=nn.BatchNorm1d(25), last=nn.Linear(25, 3)))
    small, student, fitted = recovered(teacher, noise(100, 3, 7, 7), {"first": [4]})
    assert fitted.layers == ("mix", "last")
    fresh = noise(20, 3, 7, 7, seed=9)
    assert relative(output(small, fresh), output(teacher, fresh)) > 1e-3
    assert relative(output(student, fresh), output(teacher, fresh)) < 1e-4


# ------------------------------------------------------------------------------------------------- as NumPy fits it


def lstsq(x: Tensor, y: Tensor, intercept: bool) -> Tensor:
    """The best y ≈ W x + c by NumPy, for x (unknowns, samples): the fitted y."""
    rows = torch.cat([x, torch.ones(1, x.shape[1])]) if intercept else x
    a, b = rows.T.double().numpy(), y.T.double().numpy()
    return torch.from_numpy(a @ np.linalg.lstsq(a, b, rcond=None)[0]).T


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("norm", [True, False])
def test_the_fit_is_the_least_squares_solution(bias: bool, norm: bool):
    torch.manual_seed(0)
    reader = nn.Conv2d(8, 5, 3, stride=2, padding=1, bias=bias)
    parts = [nn.Conv2d(3, 8, 3), nn.ReLU(), reader, *([nn.BatchNorm2d(5)] if norm else [])]
    teacher = randomise(nn.Sequential(*parts))
    x = noise(64, 3, 8, 8)
    small, student, fitted = recovered(teacher, x, {"0": [1, 4, 6]})
    assert fitted.layers == ("2",)
    columns = F.unfold(output(small[:2], x), 3, padding=1, stride=2).permute(1, 0, 2).flatten(1)
    expected = lstsq(columns, output(teacher, x).permute(1, 0, 2, 3).flatten(1), intercept=bias or norm)
    got = output(student, x).permute(1, 0, 2, 3).flatten(1)
    assert relative(got.double(), expected) < 1e-5
    assert torch.equal(student[0].weight, small[0].weight)
    if bias:
        assert not torch.equal(student[2].bias, small[2].bias)
    if norm:
        assert torch.equal(student[3].running_var, small[3].running_var)
        assert torch.equal(student[3].running_mean, small[3].running_mean) == bias


def test_the_ridge_draws_towards_the_old_weights():
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 5, 3)).eval()
    x = noise(64, 3, 8, 8)
    distances, errors = [], []
    for ridge in (1e-6, 1e-2, 1.0, 1e6):
        small, student, _ = recovered(teacher, x, {"0": [1, 4, 6]}, replace(EXACT, ridge=ridge))
        distances.append(float((student[2].weight - small[2].weight).norm()))
        errors.append(relative(output(student, x), output(teacher, x)))
    assert distances == sorted(distances, reverse=True)
    assert errors == sorted(errors)
    assert distances[-1] < 1e-5 * float(teacher[2].weight.norm())
    # at 1: (H + λ) W' = H W* + λ W₀, by hand for the pointwise case
    seen = torch.cat([noise(4, 400, seed=3), 3 * noise(2, 400, seed=4)])
    net = nn.Sequential(nn.Conv1d(6, 6, 1, bias=False), nn.Conv1d(6, 3, 1, bias=False)).eval()
    with torch.no_grad():
        net[0].weight.copy_(torch.eye(6)[:, :, None])
    images = seen.reshape(6, 100, 4).permute(1, 0, 2)
    small, student, _ = recovered(net, images, {"0": [5]}, LeastSquares(ridge=0.5, least_samples=10**6))
    used = images[:64].permute(1, 0, 2).flatten(1)  # a whole number of batches
    h = (used @ used.T / used.shape[1]).double()
    w = net[1].weight.detach()[:, :, 0].double()
    penalty = 0.5 * h[:5, :5].diagonal().mean() * torch.eye(5, dtype=torch.float64)
    expected = torch.linalg.solve(h[:5, :5] + penalty, (w @ h[:, :5] + w[:, :5] @ penalty).T).T
    assert torch.allclose(student[1].weight[:, :, 0].double(), expected, atol=1e-5)


def clipped_loss(
    problem: least_squares._Problem, weight: Tensor, old: Tensor, intercept: Tensor, ridge: float
) -> float:
    """Σ (distance beyond what the rectifier forgives)², as `solve` weighs channels, with its ridge."""
    low, high = problem.clips
    fixed = problem.shift if problem.o is None else problem.shift + problem.o
    u = (problem.scale * (weight @ problem.x + intercept) + fixed).double()
    z = problem.z.double()
    away = torch.where(z <= low, (u - low).clamp_min(0), torch.where(z >= high, (high - u).clamp_min(0), u - z))
    x = problem.x - problem.x.mean(2, keepdim=True)
    penalty = ridge * float((x @ x.mT / x.shape[2]).diagonal(dim1=1, dim2=2).mean())
    return float((away / problem.scale).square().mean(2).sum() + penalty * (weight - old).square().sum())


@pytest.mark.parametrize("with_branch", [False, True])
@pytest.mark.parametrize("clips", [(0.0, float("inf")), (0.0, 1.0), (-0.5, 0.5)])
def test_rectifier_steps_never_raise_the_loss(clips: tuple[float, float], with_branch: bool):
    x, z = noise(1, 6, 500), noise(1, 4, 500, seed=1)
    x[0, 0] = z[0, 0].clamp(*clips) + 0.3 * x[0, 0]
    branch = 0.5 * noise(1, 4, 500, seed=2) if with_branch else None
    scale, shift = noise(1, 4, 1, seed=5).abs() + 0.5, noise(1, 4, 1, seed=6)
    scale[0, 1] *= -1
    losses = []
    for steps in range(8):
        weight, bias = noise(4, 6, seed=7), torch.zeros(4)
        old = weight.clone()
        problem = least_squares._Problem("layer", x, z, branch, scale, shift, weight, bias, None, clips)
        problem.solve(LeastSquares(ridge=1e-3, rectifier_steps=steps))
        losses.append(clipped_loss(problem, weight, old, bias[None, :, None], 1e-3))
    assert all(later <= earlier * (1 + 1e-6) for earlier, later in itertools.pairwise(losses))
    assert losses[-1] < 0.99 * losses[0]


def test_rectifiers_are_seen():
    def clips(*parts: nn.Module) -> tuple[float, float]:
        found = []
        original = least_squares._Problem.solve

        def spy(problem: least_squares._Problem, options: LeastSquares) -> None:
            found.append(problem.clips)
            original(problem, options)

        torch.manual_seed(0)
        teacher = randomise(
            nn.Sequential(nn.Conv2d(3, 6, 1), nn.Sigmoid(), nn.Conv2d(6, 4, 1), *parts, nn.Conv2d(4, 2, 1))
        )
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(least_squares._Problem, "solve", spy)
            recovered(teacher, noise(20, 3, 6, 6), {"0": [1]})
        return found[0]

    free = (-float("inf"), float("inf"))
    assert clips() == free
    assert clips(nn.ReLU()) == (0, float("inf"))
    assert clips(nn.BatchNorm2d(4), nn.ReLU(inplace=True)) == (0, float("inf"))
    assert clips(nn.BatchNorm2d(4), nn.ReLU6()) == (0, 6)
    assert clips(nn.Hardtanh(-2, 3)) == (-2, 3)
    assert clips(nn.Hardtanh()) == (-1, 1)
    assert clips(nn.GELU()) == free
    assert clips(nn.MaxPool2d(2), nn.ReLU()) == free


# ------------------------------------------------------------------------------------------------------ the stream


class Block(nn.Module):
    def __init__(self, channels: int, inplace: bool = False) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.inplace = inplace

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)), self.inplace)))
        if self.inplace:
            y += x
            return F.relu_(y)
        return F.relu(x + y)


def residual(inplace: bool = False) -> nn.Module:
    torch.manual_seed(0)
    blocks = [Block(8, inplace) for _ in range(3)]
    return randomise(
        nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    )


INNER = {f"{i}.conv1": [0, 3, 5] for i in (1, 2, 3)}


def test_each_block_corrects_the_stream(monkeypatch: pytest.MonkeyPatch):
    teacher, x = residual(), noise(128, 3, 8, 8)
    most = {name: [0, 1, 3, 5, 6, 7] for name in INNER}
    small, corrected, fitted = recovered(teacher, x, most, LeastSquares())
    assert fitted.layers == ("1.conv2", "2.conv1", "2.conv2", "3.conv1", "3.conv2", "6")
    monkeypatch.setattr(least_squares, "ADDITIONS", ())
    _, alone, same = recovered(teacher, x, most, LeastSquares())
    assert same == fitted
    fresh = noise(64, 3, 8, 8, seed=9)
    for depth in (3, 4):  # after the second and the third block: the first has no error to correct
        expected = output(teacher[:depth], fresh)
        errors = [relative(output(model[:depth], fresh), expected) for model in (corrected, alone, small)]
        assert errors[0] < 0.99 * errors[1] < errors[2]


def test_operators_in_place_make_no_difference():
    x = noise(64, 3, 8, 8)
    plain, inplace = residual(), residual(inplace=True)
    assert all(
        torch.equal(a, b) for a, b in zip(plain.state_dict().values(), inplace.state_dict().values(), strict=True)
    )
    _, first, _ = recovered(plain, x, INNER)
    _, second, _ = recovered(inplace, x, INNER)
    for (name, a), b in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.allclose(a, b, atol=1e-5), name
    before = x.clone()
    recovered(nn.Sequential(nn.ReLU(inplace=True), *plain), x, {f"{int(k[0]) + 1}{k[1:]}": v for k, v in INNER.items()})
    assert torch.equal(x, before)


def test_a_shortcut_that_comes_later_corrects_the_sum():
    """As torchvision's ResNets have it: the projection runs after the block's own convolutions."""

    def forward(net: Net, x: Tensor) -> Tensor:
        y = F.relu(net.stem(x))
        out = net.bn2(net.conv2(F.relu(net.conv1(y))))
        out += net.down(y)
        return net.last(F.relu(out))

    torch.manual_seed(0)
    teacher = randomise(
        Net(
            forward, stem=nn.Conv2d(3, 8, 3), conv1=nn.Conv2d(8, 8, 3, padding=1), conv2=nn.Conv2d(8, 6, 3, padding=1),
            bn2=nn.BatchNorm2d(6), down=nn.Conv2d(8, 6, 1), last=nn.Conv2d(6, 3, 1),
        )
    )  # fmt: skip
    gone = {"stem": [1], "conv1": [0, 3, 5]}
    ends = []
    original = least_squares._site

    def spy(*args: object) -> least_squares.Site:
        ends.append(original(*args))  # type: ignore[arg-type]
        return ends[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(least_squares, "_site", spy)
        small, student, _ = recovered(teacher, noise(64, 3, 8, 8), gone, LeastSquares())
    assert {s.layer.name: s.other is not None for s in ends} == {
        "conv1": False, "conv2": False, "down": True, "last": False
    }  # fmt: skip
    fresh = noise(32, 3, 8, 8, seed=4)
    expected = output(teacher, fresh)
    assert relative(output(student, fresh), expected) < 0.95 * relative(output(small, fresh), expected)


# ------------------------------------------------------------------------------------------------- what it must not do


def test_only_fitted_layers_change():
    teacher, x = residual(), noise(128, 3, 8, 8)
    teacher.train()
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    versions = {k: v._version for k, v in teacher.state_dict().items()}
    draws = torch.get_rng_state()
    small, student, fitted = recovered(teacher, x, {"2.conv1": [0, 3, 5]}, LeastSquares())
    assert fitted.layers == ("2.conv2", "3.conv1", "3.conv2", "6")
    assert fitted.kept == {}
    may = {"6.weight", "6.bias"} | {f"{n}.weight" for n in fitted.layers}
    may |= {"2.bn2.running_mean", "3.bn1.running_mean", "3.bn2.running_mean"}
    for name, tensor in student.state_dict().items():
        assert torch.equal(tensor, small.state_dict()[name]) == (name not in may), name
    assert all(torch.equal(before[k], v) and versions[k] == v._version for k, v in teacher.state_dict().items())
    assert all(m.training for m in [*teacher.modules(), *student.modules()])
    assert torch.equal(draws, torch.get_rng_state())
    assert all(p.requires_grad and p.grad is None for p in student.parameters())
    # what is not affected is fitted to itself
    wide, _, _ = pruned(teacher, x, {})
    assert compensate_(wide, teacher, trace(teacher, x[:2]), trace(teacher, x[:2]).keep_all(), x) == Fitted((), {})


def test_it_is_deterministic():
    teacher, x = residual(), noise(128, 3, 8, 8)
    few = LeastSquares(samples=2, least_samples=300)
    torch.manual_seed(1)
    _, first, _ = recovered(teacher, x, INNER, few)
    torch.manual_seed(2)
    _, second, _ = recovered(teacher, x, INNER, few)
    _, other, _ = recovered(teacher, x, INNER, replace(few, seed=1))
    assert all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )
    assert not torch.equal(first[3].conv2.weight, other[3].conv2.weight)


def test_fewer_samples_and_less_memory_are_nearly_as_good():
    teacher, x = residual(), noise(192, 3, 8, 8)
    fresh = noise(64, 3, 8, 8, seed=9)
    expected = output(teacher, fresh)
    errors = {}
    for name, options in {
        "all": LeastSquares(least_samples=10**6),
        "some": LeastSquares(samples=20, least_samples=1),
        "memory": LeastSquares(memory=4 * 72 * 3000),
        "one a batch": LeastSquares(memory=1),
    }.items():
        small, student, _ = recovered(teacher, x, INNER, options)
        errors[name] = relative(output(student, fresh), expected)
    assert errors["all"] < 0.8 * relative(output(small, fresh), expected)
    assert errors["some"] < 1.15 * errors["all"]
    assert errors["memory"] < 1.15 * errors["all"]


def test_what_serves_twice_stays():
    """Tied kernels, biases and statistics: what one use would gain the other would lose."""

    def forward(net: Net, x: Tensor) -> Tensor:
        y = torch.sigmoid(net.first(x))
        one, two = net.one(y), net.two(y)  # tied kernel
        three, four = net.norm(net.three(y)), net.norm(net.four(y))  # one batch norm, no bias
        return net.last(torch.cat([one, two, three, four, net.five(y), net.six(y)], 1).relu())

    torch.manual_seed(0)
    teacher = randomise(
        Net(
            forward, first=nn.Conv2d(3, 8, 3), one=nn.Conv2d(8, 4, 1), two=nn.Conv2d(8, 4, 1), last=nn.Conv2d(24, 3, 1),
            three=nn.Conv2d(8, 4, 1, bias=False), four=nn.Conv2d(8, 4, 1, bias=False), norm=nn.BatchNorm2d(4),
            five=nn.Conv2d(8, 4, 1), six=nn.Conv2d(8, 4, 1),
        )
    )  # fmt: skip
    teacher.two.weight, teacher.six.bias = teacher.one.weight, teacher.five.bias
    twins(teacher.first)
    x = noise(64, 3, 7, 7)
    small, student, fitted = recovered(teacher, x, {"first": [4]})
    assert fitted.kept == {"one": "its weight is used several times"}
    assert fitted.layers == ("three", "four", "five", "six", "last")
    for name in ("one.weight", "one.bias", "two.bias", "norm.running_mean", "five.bias"):
        assert torch.equal(student.state_dict()[name], small.state_dict()[name]), name
    assert student.two.weight is student.one.weight
    for name in ("three", "four", "five", "six"):  # exact although the constant stays, for a twin needs none
        y, z = torch.sigmoid(student.first(x)), torch.sigmoid(teacher.first(x))
        assert relative(student.get_submodule(name)(y), teacher.get_submodule(name)(z)) < 1e-4
    assert relative(output(student, x), output(teacher, x)) < relative(output(small, x), output(teacher, x))


def test_dead_scales_are_left_alone():
    torch.manual_seed(0)
    teacher = randomise(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 5, 3, bias=False), nn.BatchNorm2d(5)))
    with torch.no_grad():
        teacher[3].weight[2] = 0
    small, student, _ = recovered(teacher, noise(64, 3, 8, 8), {"0": [1, 4]})
    assert torch.equal(student[2].weight[2], small[2].weight[2])
    assert torch.equal(student[3].running_mean[2], small[3].running_mean[2])
    assert not torch.equal(student[2].weight[1], small[2].weight[1])
    with torch.no_grad():
        teacher[3].weight.zero_()
    small, student, _ = recovered(teacher, noise(64, 3, 8, 8), {"0": [1, 4]})
    assert torch.equal(student[2].weight, small[2].weight)


def test_layers_that_are_not_fitted_are_told():
    torch.manual_seed(0)
    teacher = randomise(
        nn.Sequential(
            nn.Conv2d(3, 8, 3),
            nn.ReLU(),
            nn.ConvTranspose2d(8, 6, 2),
            nn.ReLU(),
            nn.Conv2d(6, 4, 3),
            nn.Conv2d(4, 2, 1),
        )
    )
    small, student, fitted = recovered(teacher, noise(64, 3, 8, 8), {"0": [1]}, replace(EXACT, widest=53))
    assert fitted.layers == ("5",)
    assert fitted.kept == {
        "2": "transposed convolutions are not fitted",
        "4": "54 unknowns per output channel are more than 53",
    }
    assert torch.equal(student[2].weight, small[2].weight)
    assert torch.equal(student[4].weight, small[4].weight)
    _, _, fitted = recovered(teacher, noise(64, 3, 8, 8), {"0": [1], "2": [0]}, replace(EXACT, widest=53))
    assert fitted.layers == ("4", "5")  # 45 unknowns are left of the 54


def test_progress():
    teacher, x = residual(), noise(16, 3, 8, 8)
    small, graph, keep = pruned(teacher, x, INNER)
    seen: list[tuple[int, int]] = []
    compensate_(small, teacher, graph, keep, x, on_progress=lambda done, total: seen.append((done, total)))
    assert seen == [(i, 6) for i in range(1, 7)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_types(dtype: torch.dtype):
    teacher, x = residual().to(dtype), noise(64, 3, 8, 8).to(dtype)
    if dtype is torch.float64:
        small, student, _ = recovered(teacher, x, INNER)
        assert student[1].conv2.weight.dtype is dtype
        assert relative(output(student, x), output(teacher, x)) < relative(output(small, x), output(teacher, x))
    else:
        with pytest.raises(ConvpareError, match=f"0.weight is {dtype}, which is too coarse for least squares"):
            recovered(teacher, x, INNER)


# --------------------------------------------------------------------------------------------------------------- errors


def test_images_that_are_no_numbers():
    x = noise(16, 3, 8, 8)
    x[3, 1, 2, 2] = float("nan")
    with pytest.raises(ConvpareError, match="the calibration images contain NaN or infinite values"):
        recovered(residual(), x, INNER)


def test_weights_that_are_no_numbers():
    teacher = residual()
    with torch.no_grad():
        teacher[1].conv1.weight[1, 0, 0, 0] = float("nan")
    with pytest.raises(ConvpareError, match=r"the inputs of layer '1.conv2' are linearly dependent, or contain NaN"):
        recovered(teacher, noise(16, 3, 8, 8), INNER)


def test_no_ridge_and_dependent_inputs():
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Conv2d(3, 8, 1, bias=False), nn.Conv2d(8, 4, 1)).eval()  # eight channels of rank three
    with pytest.raises(
        ConvpareError, match=r"layer '1' are linearly dependent.* give a ridge above 0, or choose batch-norm"
    ):
        recovered(teacher, noise(64, 3, 8, 8), {"0": [1]}, replace(EXACT, ridge=0.0))
    _, student, _ = recovered(teacher, noise(64, 3, 8, 8), {"0": [1]}, LeastSquares(ridge=1e-6))
    x = noise(8, 3, 8, 8)
    assert relative(output(student, x), output(teacher, x)) < 1e-3


def test_another_forward():
    """One whose operators depend on its width."""

    def forward(net: Net, x: Tensor) -> Tensor:
        y = net.first(x)
        return net.last(y.relu() if y.shape[1] > 7 else y.sigmoid())

    torch.manual_seed(0)
    teacher = Net(forward, first=nn.Conv2d(3, 8, 3), last=nn.Conv2d(8, 4, 1)).eval()
    with pytest.raises(ConvpareError, match=r"runs other operators than the original \(3 and 3 of them\)"):
        recovered(teacher, noise(16, 3, 8, 8), {"first": [1]})


def test_another_network():
    teacher, x = residual(), noise(16, 3, 8, 8)
    small, graph, keep = pruned(teacher, x, INNER)
    with pytest.raises(
        ConvpareError, match=r"the plan makes 1.conv1.weight \(5, 8, 3, 3\) of \(8, 8, 3, 3\), but in this"
    ):
        compensate_(copy.deepcopy(teacher), teacher, graph, keep, x)
    with pytest.raises(ConvpareError, match="but in this network it is missing"):
        compensate_(nn.Sequential(*list(small)[:-1]), teacher, graph, keep, x)


def test_several_inputs():
    teacher = Net(
        lambda net, x, z: net.last(net.a(x) + net.b(z)),
        a=nn.Conv2d(3, 4, 1),
        b=nn.Conv2d(3, 4, 1),
        last=nn.Conv2d(4, 2, 1),
    )
    x = noise(8, 3, 4, 4)
    graph = trace(teacher, (x, x))
    keep = graph.keep_all()
    keep[0] = False
    with pytest.raises(ConvpareError, match="does not run on inputs of shape"):
        compensate_(removed(teacher, graph, keep), teacher, graph, keep, x)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"ridge": -1e-3}, "ridge is -0.001; expected a number of 0 or more"),
        ({"ridge": float("nan")}, "ridge is nan"),
        ({"rectifier_steps": -1}, "rectifier_steps is -1"),
        ({"samples": 0}, "samples is 0; expected 1 or more"),
        ({"memory": 0}, "memory is 0; expected 1 or more"),
    ],
)
def test_wrong_options(given: dict[str, float], said: str):
    with pytest.raises(ConvpareError, match=said):
        LeastSquares(**given)  # type: ignore[arg-type]
