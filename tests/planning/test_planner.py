"""A plan keeps what it predicts, takes no notice of labels, leaves the model alone, and says what is wrong."""

import copy
import json
import random
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convpare.apply import apply, plan_of
from convpare.blocks import digits_net, mobilenet_v1_025, resnet20
from convpare.data import Data, ImageSet, Preprocessing
from convpare.data.splits import ArrayPixels, Split
from convpare.errors import ConvpareError
from convpare.graph import Graph, trace
from convpare.importance import Context, Ranking, criteria, criterion
from convpare.importance import registry as criteria_registry
from convpare.planning.cost import count
from convpare.planning.plan import Plan, load_plan
from convpare.planning.planner import plan
from convpare.planning.settings import PlanOptions

NAMES = ("qsfm-ssim", "qsfm-psnr", "reconstruction", "sensitivity", "l1", "l2", "bn-scale", "random")
X = torch.zeros(1, 1, 8, 8)


def randomised(build: Callable[[], nn.Module]) -> nn.Module:
    """Untrained, with batch norms that differ from channel to channel."""
    torch.manual_seed(0)
    model = build()
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.weight.uniform_(0.5, 1.5)
                m.bias.uniform_(-0.5, 0.5)
                m.running_mean.uniform_(-0.2, 0.2)
    return model.eval()


@cache
def digits() -> nn.Module:
    return randomised(digits_net)


@cache
def digits_graph() -> Graph:
    return trace(digits(), X)


@cache
def images(n: int = 24, shape: tuple[int, ...] = (1, 8, 8), seed: int = 3) -> Tensor:
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed))


def make(name: str = "l2", model: nn.Module | None = None, data: Any = None, **given: Any) -> Plan:
    """A plan for the digits' network, half of its MACs unless said otherwise."""
    budgets = {m: given.pop(m) for m in ("macs", "params") if m in given}
    if not budgets and "threshold" not in given:
        budgets = {"macs": 0.5}
    data = images() if data is None else data
    graph = digits_graph() if model is None else None
    return plan(model or digits(), X, data, criterion=name, options=PlanOptions(**given), graph=graph, **budgets)


def test_all_criteria_are_tested_here():
    assert set(NAMES) == set(criteria())


@pytest.mark.parametrize("name", NAMES)
def test_what_was_predicted_is_what_is_counted(name: str):
    made = make(name)
    small = apply(digits(), made)
    assert count(small, X).total == made.after
    assert count(digits(), X).total == made.before
    assert made.achieved["macs"] <= 0.5
    assert made.requested == {"macs": 0.5}
    assert made.criterion == name
    assert plan_of(small) == made
    assert all(edit.error is not None and edit.error >= 0 for edit in made.edits)


@pytest.mark.parametrize(("build", "shape"), [(resnet20, (2, 3, 32, 32)), (mobilenet_v1_025, (1, 3, 32, 32))])
def test_larger_networks(build: Callable[[], nn.Module], shape: tuple[int, ...]):
    model, x = randomised(build), torch.zeros(shape)
    for scope in ("inner", "all"):
        made = plan(model, x, macs=0.6, params=0.5, criterion="l1", options=PlanOptions(scope=scope))
        assert count(apply(model, made, check=False), x).total == made.after
        assert made.achieved["macs"] <= 0.6
        assert made.achieved["params"] <= 0.5


def test_a_plan_that_was_saved_makes_the_same_network(tmp_path: Any):
    made = make("qsfm-ssim", scope="all", exclude=("block2.conv1",))
    made.save(tmp_path / "plan.json")
    read = load_plan(tmp_path / "plan.json")
    assert read.to_json() == made.to_json() == json.loads((tmp_path / "plan.json").read_text())
    first, second = apply(digits(), made).state_dict(), apply(digits(), read).state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


# ------------------------------------------------------------------------------------------------------------ options


def removed(made: Plan) -> dict[str, int]:
    return {edit.group: edit.removed for edit in made.edits}


def test_scopes():
    graph = digits_graph()
    inner = {g.name for g in graph.groups if graph.is_inner(g)}
    assert inner == {"block1.conv1", "block2.conv1"}
    assert set(removed(make(scope="inner"))) == inner
    assert set(removed(make(scope="all", allocation="uniform"))) == {g.name for g in graph.groups}
    assert make(scope="auto").options["scope"] == "inner"
    assert make(scope="auto").edits == make(scope="inner").edits
    assert make(scope="auto", macs=0.03).options["scope"] == "all"


def test_what_is_excluded_stays():
    assert set(removed(make(exclude=("block1.conv1",), macs=0.7))) == {"block2.conv1"}
    assert make(exclude=("block1.conv1",), macs=0.7).options["exclude"] == ["block1.conv1"]
    with pytest.raises(ConvpareError, match="infeasible"):
        make(exclude=tuple(g.name for g in digits_graph().groups))


def test_what_is_excluded_or_out_of_scope_need_not_be_scored():
    def with_prelu() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.PReLU(8), nn.Conv2d(8, 6, 1), nn.PReLU(6), nn.Conv2d(6, 2, 1)
        )

    model = randomised(with_prelu)
    with pytest.raises(ConvpareError, match="'3' has nothing that this criterion could score"):
        make("bn-scale", model, macs=0.8)
    assert set(removed(make("bn-scale", model, macs=0.8, exclude=("3",)))) == {"0"}


def test_allocations():
    uniform, spread = make(allocation="uniform", scope="inner"), make(allocation="global", scope="inner")
    shares = [edit.removed / edit.channels for edit in uniform.edits]
    assert len(shares) == 2
    assert max(shares) - min(shares) < 0.05
    assert sum(e.error or 0 for e in spread.edits) < sum(e.error or 0 for e in uniform.edits)
    assert make("random").options["allocation"] == "uniform"
    assert make("l2").options["allocation"] == "global"
    assert make("l2").edits == make("l2", allocation="global").edits


def test_threshold():
    graph = digits_graph()
    ranked = criteria()["l2"].rank(Context(digits(), graph, graph.keep_all()))
    made = make("l2", threshold=0.9, scope="all")
    for group in graph.groups:
        expected = int((ranked[group.name].errors <= 0.9).sum())
        assert removed(made).get(group.name, 0) == expected > 0
    assert made.requested == {}
    assert made.options["threshold"] == 0.9
    assert make("l2", threshold=0.0).edits == ()
    everything = make("l2", threshold=1e9, scope="all")
    assert all(len(edit.keep) == 1 for edit in everything.edits)
    assert len(everything.edits) == len(graph.groups)
    rounded = make("l2", threshold=0.9, scope="all", round_to=8)
    for edit in rounded.edits:
        assert len(edit.keep) % 8 == 0
        assert removed(made)[edit.group] - 8 < edit.removed <= removed(made)[edit.group]


def test_rounds():
    """Later rounds see the network without what is gone, and go on from there."""
    seen: list[np.ndarray] = []

    def spy(context: Context) -> dict[str, Ranking]:
        seen.append(context.alive)
        with torch.no_grad():
            for group in context.groups:
                for (parameter, axis), units in context.graph.units.items():
                    gone = np.flatnonzero((units >= group.start) & (units < group.start + group.channels))
                    gone = gone[~context.alive[units[gone]]]
                    assert not context.tensor(parameter).index_select(axis, torch.from_numpy(gone)).any()
        return criteria()["qsfm-ssim"].rank(context)

    criterion("spy", needs_images=True)(_documented(spy))
    try:
        made = make("spy", rounds=3, scope="all")
    finally:
        criteria_registry._CRITERIA.pop("spy")
    shares = [1 - alive.mean() for alive in seen]
    assert shares[0] == 0 < shares[1] < shares[2]
    assert len(seen) == 3
    final = made.keep(digits_graph())
    assert (~final).sum() > (~seen[2]).sum()
    assert (final & ~seen[2]).sum() <= 2  # what is gone stays gone, but for what fills the budget up
    assert made.achieved["macs"] <= 0.5
    assert make("qsfm-ssim", rounds=3, scope="all").edits != make("qsfm-ssim", scope="all").edits
    for name in NAMES:
        assert make(name, rounds=2, threshold=0.05).achieved["macs"] <= 1
        assert make(name, rounds=2).achieved["macs"] <= 0.5


def _documented(rank: Any) -> Any:
    rank.__doc__ = "A spy."
    return rank


# ------------------------------------------------------------------------------------------- what it must not depend on


@pytest.mark.parametrize("name", NAMES)
def test_the_same_seed_gives_the_same_plan(name: str):
    torch.manual_seed(1)
    first = make(name, images=10, seed=4)
    torch.manual_seed(2)
    assert make(name, images=10, seed=4) == first
    if name in ("qsfm-ssim", "qsfm-psnr", "reconstruction"):
        assert make(name, images=10, seed=5).edits != first.edits


@pytest.mark.parametrize("name", NAMES)
def test_the_model_is_untouched(name: str):
    model = copy.deepcopy(digits())
    for number, module in enumerate(model.modules()):
        module.training = number % 2 == 0
    handle = model.fc.register_forward_hook(lambda *_: None)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    hooks = {n: (len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in model.named_modules()}
    modes = [m.training for m in model.modules()]
    draws = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    make(name, model, rounds=2)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in state.items())
    assert hooks == {n: (len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in model.named_modules()}
    assert modes == [m.training for m in model.modules()]
    assert torch.equal(draws[0], torch.get_rng_state())
    assert draws[1:] == (np.random.get_state()[1].tolist(), random.getstate())
    assert torch.is_grad_enabled()
    assert all(p.grad is None for p in model.parameters())
    handle.remove()


def test_hooks_go_even_if_it_fails():
    model = copy.deepcopy(digits())
    for name in ("qsfm-ssim", "qsfm-psnr", "reconstruction"):
        with pytest.raises(ConvpareError, match="the model failed on images of shape"):
            make(name, model, torch.randn(4, 3, 8, 8))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_labels_are_not_used():
    pixels = ArrayPixels("noise", torch.rand(30, 1, 8, 8, generator=torch.Generator().manual_seed(0)))
    preprocessing = Preprocessing((0.5,), (0.25,))

    def labelled(labels: Tensor | None) -> ImageSet:
        return ImageSet("train", Split(pixels, labels), preprocessing, None if labels is None else 10)

    bare = make("reconstruction", data=labelled(None))
    assert bare.edits
    assert make("reconstruction", data=labelled(torch.zeros(30, dtype=torch.long))) == bare
    assert make("reconstruction", data=labelled(torch.arange(30) % 10)) == bare
    data = Data("noise", preprocessing, labelled(None), None, None, (), "")
    assert make("reconstruction", data=data) == bare
    assert make("reconstruction", data=labelled(None).tensor(limit=128, seed=0)).edits != ()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NAMES)
def test_other_types(name: str, dtype: torch.dtype):
    model = copy.deepcopy(digits()).to(dtype)
    made = make(name, model)
    assert made.achieved["macs"] <= 0.5
    if dtype is torch.float64:
        computed = name.startswith("qsfm") or name in ("reconstruction", "sensitivity")  # from activations, so rounded
        assert made.edits == make(name).edits or computed
    small = apply(model, made, check=False)
    assert next(small.parameters()).dtype is dtype


# ------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"scope": "some"}, "no scope 'some'; choose one of auto, inner, all"),
        ({"allocation": "fair"}, "no allocation 'fair'; choose one of uniform, global"),
        ({"rounds": 0}, "rounds is 0; expected 1 or more"),
        ({"images": 0}, "images is 0; expected 1 or more"),
        ({"round_to": -4}, "round_to is -4; expected 1 or more"),
        ({"threshold": float("nan")}, "threshold is nan; expected a number of 0 or more"),
        ({"threshold": -0.1}, "threshold is -0.1"),
        ({"threshold": float("inf")}, "threshold is inf"),
        ({"exclude": ("block9",)}, "no group 'block9' in DigitsNet; its groups are stem.0, block1.conv1, separable.3"),
        ({"threshold": 0.1, "macs": 0.5}, "give either a budget .* or a threshold"),
        ({"criterion_options": {"tap": "conv"}}, "no option 'tap'; it has none"),
    ],
)
def test_wrong_options(given: dict[str, Any], said: str):
    with pytest.raises(ConvpareError, match=said):
        make("l2", **given)


def test_options_of_criteria():
    with pytest.raises(
        ConvpareError, match="QSFM has no option 'taps'; its options are data_range, rule, tap, who, window"
    ):
        make("qsfm-ssim", criterion_options={"taps": "conv"})
    for option, value, said in [
        ("tap", "convolution", "no tap 'convolution'; choose one of activation, conv"),
        ("window", "hann", "window is 'hann'; give one of 'global', 'gaussian'"),
        ("data_range", "batch", "data_range is 'batch'; give one of 'layer', 'image'"),
        ("rule", "triple", "rule is 'triple'; give one of 'pair', 'mean', 'max'"),
        ("who", "me", "who is 'me'; give one of 'total', 'norm'"),
    ]:
        with pytest.raises(ConvpareError, match=said):
            make("qsfm-psnr", criterion_options={option: value})
    with pytest.raises(ConvpareError, match="no option 'seeds'; its options are seed"):
        make("random", criterion_options={"seeds": 3})
    assert make("random", criterion_options={"seed": 3}).edits != make("random").edits
    with pytest.raises(ConvpareError, match="no option 'ridge'; it has none"):
        make("reconstruction", criterion_options={"ridge": 3})


def test_unknown_criterion():
    with pytest.raises(
        ConvpareError, match="no criterion 'taylor'; choose one of bn-scale, l1, l2, qsfm-psnr, qsfm-ssim"
    ):
        make("taylor")


def test_no_budget():
    with pytest.raises(ConvpareError, match="give either a budget"):
        plan(digits(), X, criterion="l2")


@pytest.mark.parametrize("name", ["qsfm-ssim", "qsfm-psnr", "reconstruction"])
def test_wrong_images(name: str):
    with pytest.raises(ConvpareError, match=f"criterion {name} looks at feature maps and needs images"):
        plan(digits(), X, macs=0.5, criterion=name)
    with pytest.raises(ConvpareError, match="needs images"):
        make(name, data=torch.zeros(0, 1, 8, 8))
    with pytest.raises(ConvpareError, match="data is a str; expected images"):
        make(name, data="digits")
    poisoned = images().clone()
    for value in (float("nan"), float("inf")):
        poisoned[3, 0, 2, 2] = value
        with pytest.raises(ConvpareError, match="the calibration images contain NaN or infinite values"):
            make(name, data=poisoned)


@pytest.mark.parametrize("name", [n for n in NAMES if n != "random"])
def test_weights_that_are_no_numbers(name: str):
    for value in (float("nan"), float("inf")):
        model = copy.deepcopy(digits())
        with torch.no_grad():
            for m in model.modules():
                if isinstance(m, nn.Conv2d | nn.BatchNorm2d):
                    m.weight.view(-1)[1] = value
        with pytest.raises(ConvpareError, match=r"NaN|finite"):
            make(name, model)


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.last = nn.Conv2d(1, 6, 3), nn.Conv2d(1, 6, 3), nn.Conv2d(12, 2, 1)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return self.last(torch.cat([F.relu(self.left(x)), F.relu(self.right(z))], 1))


def test_several_inputs():
    model = randomised(TwoInputs)
    for name in ("qsfm-ssim", "reconstruction"):
        with pytest.raises(ConvpareError, match=f"TwoInputs takes 2 inputs, but criterion {name} can feed images only"):
            plan(model, (X, X), images(), macs=0.5, criterion=name)
    made = plan(model, (X, X), macs=0.5, criterion="l2")
    assert count(apply(model, made), (X, X)).total == made.after


def test_nothing_to_remove():
    with pytest.raises(ConvpareError, match="nothing in Conv2d can be removed; inspect says why"):
        plan(nn.Conv2d(1, 4, 3), X, macs=0.5, criterion="l2")


@pytest.mark.parametrize(
    ("ranking", "said"),
    [
        (None, "does not rank the 32 channels of 'block1.conv1'"),
        (Ranking(np.arange(5), np.zeros(5)), "does not rank the 32 channels"),
        (Ranking(np.zeros(32, int), np.zeros(32)), "does not rank the 32 channels"),
        (Ranking(np.arange(32), np.zeros(31)), "errors that are not all finite numbers of 0 or more, one a channel"),
        (Ranking(np.arange(32), np.full(32, np.nan)), "do the weights contain NaN"),
        (Ranking(np.arange(32), np.full(32, -1.0)), "not all finite numbers of 0 or more"),
    ],
)
def test_criteria_that_rank_wrongly(ranking: Ranking | None, said: str):
    def broken(context: Context) -> dict[str, Ranking]:
        return {} if ranking is None else {g.name: ranking for g in context.groups}

    criterion("broken")(_documented(broken))
    try:
        with pytest.raises(ConvpareError, match="registered already"):
            criterion("broken")(_documented(broken))
        with pytest.raises(ConvpareError, match=said):
            make("broken")
    finally:
        criteria_registry._CRITERIA.pop("broken")
