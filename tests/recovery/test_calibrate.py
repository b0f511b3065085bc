"""The best of three by what was kept aside: never worse than surgery alone, and nothing else is touched."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convpare.apply import apply, plan_of
from convpare.blocks import digits_net
from convpare.errors import ConvpareError
from convpare.graph import trace
from convpare.planning.plan import Plan, RemoveChannels
from convpare.planning.planner import calibration_images, plan
from convpare.recovery import LeastSquares, RecoverOptions, compensate_, recalibrate_, recover, recover_with
from convpare.recovery.outputs import outputs

X = torch.zeros(1, 1, 8, 8)


def noise(n: int, seed: int = 0) -> Tensor:
    return torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


def pair(share: float = 0.5, criterion: str = "random") -> tuple[nn.Module, nn.Module]:
    """The digits' network with statistics of noise, and what is left of it."""
    torch.manual_seed(0)
    teacher = digits_net().eval()
    recalibrate_(teacher, [noise(64, 7)])
    return teacher, apply(teacher, plan(teacher, X, macs=share, criterion=criterion), check=False)


def state(model: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(v, other[k]) for k, v in one.items())


def test_the_best_is_taken_and_the_errors_are_right():
    teacher, small = pair(0.8)
    images = noise(260)
    done = recover_with(small, teacher, images, options=RecoverOptions(seed=3))
    drawn = calibration_images(images, 1024, 3)
    assert drawn is not None
    held, fit = drawn[:26], drawn[26:]
    norm, fitted = copy.deepcopy(small), copy.deepcopy(small)
    recalibrate_(norm, fit.tensor_split(2))
    graph = trace(teacher, X)
    made = plan_of(small)
    assert made is not None
    told = compensate_(fitted, teacher, graph, made.keep(graph), fit)
    with torch.no_grad():
        z = teacher(held)
        spread = (z - z.mean(0)).square().sum()
        expected = {
            name: float((model(held) - z).square().sum() / spread)
            for name, model in (("none", small), ("batch-norm", norm), ("least-squares", fitted))
        }
    assert done.errors == pytest.approx(expected, rel=1e-4)
    assert done.method == min(expected, key=lambda name: expected[name]) == "least-squares"
    assert done.errors["least-squares"] < 0.5 * done.errors["none"]
    assert same(state(done.model), state(fitted))
    assert done.fitted == told
    assert done.images == 260
    assert plan_of(done.model) is not None


@pytest.mark.parametrize("seed", range(4))
def test_never_worse_than_surgery_alone(seed: int):
    teacher, small = pair(0.4 + 0.1 * seed, "l2")
    done = recover_with(small, teacher, noise(20, seed), options=RecoverOptions(seed=seed))
    assert done.errors[done.method] == min(done.errors.values()) <= done.errors["none"]
    assert set(done.errors) == {"none", "batch-norm", "least-squares"}


def test_nothing_is_better_than_nothing_where_nothing_is_missing():
    teacher, _ = pair()
    whole = apply(teacher, plan(teacher, X, macs=1.0, criterion="l2"))
    done = recover_with(whole, teacher, noise(20))
    assert done.method == "none"
    assert done.errors["none"] == 0
    assert same(state(done.model), state(teacher))
    assert done.fitted is None


@pytest.mark.parametrize("method", ["least-squares", "batch-norm", "none"])
def test_one_method(method: str):
    teacher, small = pair()
    done = recover_with(small, teacher, noise(40), options=RecoverOptions(method))
    assert done.method == method
    assert set(done.errors) == {method}
    assert (done.fitted is not None) == (method == "least-squares")
    assert same(state(done.model), state(small)) == (method == "none")
    assert same(state(recover(small, teacher, noise(40), options=RecoverOptions(method))), state(done.model))


def test_both_networks_are_untouched():
    teacher, small = pair()
    for model in (teacher, small):
        for number, module in enumerate(model.modules()):
            module.training = number % 3 == 0
    before = state(teacher), state(small)
    modes = [[m.training for m in model.modules()] for model in (teacher, small)]
    draws, images = torch.get_rng_state(), noise(30)
    kept = images.clone()
    done = recover_with(small, teacher, images)
    assert same(state(teacher), before[0])
    assert same(state(small), before[1])
    assert modes == [[m.training for m in model.modules()] for model in (teacher, small)]
    assert modes[1] == [m.training for m in done.model.modules()]
    assert torch.equal(draws, torch.get_rng_state())
    assert torch.equal(images, kept)
    assert all(p.requires_grad and p.grad is None for p in done.model.parameters())
    ours = {p.data_ptr() for p in done.model.parameters()}
    assert not ours & {p.data_ptr() for p in [*small.parameters(), *teacher.parameters()]}


def test_it_is_deterministic():
    teacher, small = pair()
    options = RecoverOptions(images=40, least_squares=LeastSquares(samples=1, least_samples=100))
    torch.manual_seed(5)
    first = recover_with(small, teacher, noise(60), options=options)
    torch.manual_seed(6)
    second = recover_with(small, teacher, noise(60), options=options)
    assert first.errors == second.errors
    assert same(state(first.model), state(second.model))
    other = recover_with(small, teacher, noise(60), options=RecoverOptions(images=40, seed=1))
    assert not same(state(first.model), state(other.model))


def test_progress():
    teacher, small = pair()
    seen: list[tuple[int, int]] = []
    recover(small, teacher, noise(20), on_progress=lambda done, total: seen.append((done, total)))
    assert seen == [(i, len(seen)) for i in range(1, len(seen) + 1)]
    assert seen


def test_a_network_made_by_hand_needs_its_plan():
    teacher, small = pair()
    made = plan_of(small)
    bare = copy.deepcopy(small)
    del bare.__dict__["_convpare_plan"]
    with pytest.raises(ConvpareError, match="this network carries no plan; give plan="):
        recover(bare, teacher, noise(20))
    assert same(state(recover(bare, teacher, noise(20), plan=made)), state(recover(small, teacher, noise(20))))
    wrong = plan(teacher, X, macs=0.8, criterion="l1")
    with pytest.raises(ConvpareError, match=r"the plan makes block1.conv1.weight .*, but in this network it is"):
        recover(small, teacher, noise(20), plan=wrong)


# ------------------------------------------------------------------------------------------------------- many networks


def surgery(teacher: nn.Module, x: Tensor, gone: dict[str, list[int]]) -> nn.Module:
    graph = trace(teacher, x)
    edits = []
    for name, channels in gone.items():
        total = graph.group(name).channels
        edits.append(RemoveChannels(name, tuple(c for c in range(total) if c not in channels), total))
    cost = plan(teacher, x, macs=1.0, criterion="l2", graph=graph)
    made = Plan(graph.model, graph.inputs, "hand", {}, {}, cost.before, cost.after, tuple(edits))
    return apply(teacher, made, graph=graph)


class Headed(nn.Module):
    """A batch norm after pooling, which sees one value an image."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(1, 8, 3), nn.BatchNorm1d(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.norm(F.relu(self.conv(x)).mean((2, 3)))))


@pytest.mark.parametrize("images", [4, 5, 143, 144])
def test_batches_of_one_image_do_not_come_up(images: int):
    """143: 14 are kept aside, and of 129 one would be left over."""
    torch.manual_seed(0)
    teacher = Headed().eval()
    done = recover_with(
        surgery(teacher, X, {"conv": [2]}), teacher, noise(images), options=RecoverOptions("batch-norm")
    )
    assert done.images == images
    assert torch.isfinite(done.model.norm.running_var).all()


class Outputs(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.conv, self.a, self.b = kind, nn.Conv2d(1, 8, 3), nn.Conv2d(8, 3, 1), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Any:
        y = F.relu(self.conv(x))
        a, b = self.a(y), self.b(y)
        return {"tuple": (a, b), "dict": {"first": (a, [b]), "second": b}, "nested": [[a], b]}[self.kind]


@pytest.mark.parametrize("kind", ["tuple", "dict", "nested"])
def test_the_first_of_several_outputs_is_compared(kind: str):
    torch.manual_seed(0)
    teacher = Outputs(kind).eval()
    small = surgery(teacher, X, {"conv": [1, 5]})
    done = recover_with(small, teacher, noise(300))
    assert done.method == "least-squares"
    assert "batch-norm" not in done.errors  # there is none
    x = noise(5)
    with torch.no_grad():
        torch.testing.assert_close(outputs(teacher, x, 2), teacher.a(F.relu(teacher.conv(x))), rtol=1e-5, atol=1e-6)
        assert done.errors["least-squares"] < done.errors["none"]


def test_outputs_that_are_no_tensors():
    with pytest.raises(ConvpareError, match="the model returns a float first; a tensor is expected"):
        outputs(Returns(0.5), noise(3))
    with pytest.raises(ConvpareError, match="returns a list first"):
        outputs(Returns([]), noise(3))


class Returns(nn.Module):
    def __init__(self, value: object) -> None:
        super().__init__()
        self.value = value

    def forward(self, x: Tensor) -> object:
        return self.value


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_types(dtype: torch.dtype):
    """Images are cast to the network's type; least squares wants at least float32."""
    teacher, _ = pair()
    teacher = teacher.to(dtype)
    small = apply(teacher, plan(teacher, X.to(dtype), macs=0.5, criterion="l2"), check=False)
    done = recover_with(small, teacher, noise(40), options=RecoverOptions("batch-norm"))
    assert next(done.model.parameters()).dtype is dtype
    if dtype is torch.float64:
        errors = recover_with(small, teacher, noise(260)).errors
        assert errors["least-squares"] < errors["none"]
    else:
        with pytest.raises(ConvpareError, match="which is too coarse for least squares; recover networks in float32"):
            recover(small, teacher, noise(40))


# --------------------------------------------------------------------------------------------------------------- errors


def test_too_few_images():
    teacher, small = pair()
    for n in (0, 1, 3):
        with pytest.raises(ConvpareError, match=f"recovery needs at least 4 calibration images, {n} given"):
            recover(small, teacher, noise(n))
    with pytest.raises(ConvpareError, match=r"recovery is to use 2 image\(s\); at least 4 are needed"):
        RecoverOptions(images=2)
    with pytest.raises(
        ConvpareError, match="no recovery 'distil'; choose one of calibrate, least-squares, batch-norm, none"
    ):
        RecoverOptions("distil")
    with pytest.raises(ConvpareError, match="data is a list; expected images"):
        recover(small, teacher, [noise(10)])  # type: ignore[arg-type]


@pytest.mark.parametrize("method", ["calibrate", "least-squares", "batch-norm"])
def test_what_is_no_number(method: str):
    teacher, small = pair()
    images = noise(20)
    images[7, 0, 1, 1] = float("inf")
    with pytest.raises(ConvpareError, match="the calibration images contain NaN or infinite values"):
        recover(small, teacher, images, options=RecoverOptions(method))
    with torch.no_grad():
        teacher.fc.bias[0] = float("nan")
    with pytest.raises(ConvpareError, match=r"not finite|contain NaN"):
        recover(small, teacher, noise(20), options=RecoverOptions(method))


def test_no_batch_norm_to_recalibrate():
    torch.manual_seed(0)
    teacher = Outputs("tuple").eval()
    small = surgery(teacher, X, {"conv": [1]})
    with pytest.raises(ConvpareError, match="this network has no batch norm to recalibrate; choose least-squares"):
        recover(small, teacher, noise(20), options=RecoverOptions("batch-norm"))


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.last = nn.Conv2d(1, 4, 3), nn.Conv2d(1, 4, 3), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return self.last(F.relu(self.a(x) + self.b(z)))


def test_several_inputs():
    teacher = Two()
    small = apply(teacher, plan(teacher, (X, X), macs=0.7, criterion="l2"))
    for method in ("calibrate", "least-squares", "batch-norm"):
        with pytest.raises(
            ConvpareError, match="Two takes 2 inputs; recovery can feed images only to a network with one"
        ):
            recover(small, teacher, noise(20), options=RecoverOptions(method))
