"""The self-check notices what the trace cannot see, and names the group."""

import copy

import pytest
import torch
from checks import WHOLE
from nets import Net, conv
from torch import nn

from convpare.errors import ConvpareError
from convpare.graph import SelfCheck, culprits, removed, self_check, trace, zeroed

IMAGE = torch.zeros(2, 3, 8, 8)


def doubled_when_it_is_narrow() -> nn.Module:
    """The first group changes the others by a choice that no label shows, and no trial meets; the second is sound."""

    def forward(net: Net, x: torch.Tensor) -> torch.Tensor:
        y = net.a(x)
        return net.c(torch.relu(net.b(2 * y if y.shape[1] == 1 else y)))

    torch.manual_seed(0)
    return Net(forward, a=conv(3, 4), b=conv(4, 6), c=conv(6, 2))


def test_what_no_trial_meets_is_caught_and_named():
    model = doubled_when_it_is_narrow()
    graph = trace(model, IMAGE)
    assert [(g.name, g.channels) for g in graph.groups] == [("a", 4), ("b", 6)]
    keep = graph.keep_all()
    keep[[1, 2, 3, 5]] = False
    check = self_check(model, graph, keep)
    assert not check.passed
    assert 1e-3 < check.max_relative_error < 10
    assert [g.name for g in culprits(model, graph, keep)] == ["a"]
    keep[1] = True
    assert self_check(model, graph, keep).passed
    assert culprits(model, graph, keep) == []


def test_the_graph_form_is_compared_with_its_module():
    """Here with a module that has other weights than the graph was captured with, and folds another kernel."""
    model = nn.Sequential(conv(3, 4), nn.BatchNorm2d(4), conv(4, 2))
    graph = trace(model, IMAGE, "graph")
    assert self_check(model, graph, graph.keep_all()).passed
    other = copy.deepcopy(model)
    other[1].register_forward_hook(lambda module, args, result: 2 * result)
    assert not self_check(other, graph, graph.keep_all()).passed


def test_groups_that_change_the_others_are_no_part_of_the_proof():
    """They are named, and the smaller net must run."""

    def forward(net: Net, x: torch.Tensor) -> torch.Tensor:
        return net.c(net.b(net.n(net.a(x).movedim(1, -1)).movedim(-1, 1)).relu())

    torch.manual_seed(0)
    model = Net(forward, a=conv(3, 4), n=nn.LayerNorm(4), b=conv(4, 6), c=conv(6, 2))
    for form in WHOLE:
        graph = trace(model, IMAGE, form)
        assert [(g.name, g.inexact is None) for g in graph.groups] == [("a", False), ("b", True)]
        keep = graph.keep_all()
        keep[5] = False
        assert self_check(model, graph, keep).unproved == ()
        keep[0] = False
        check = self_check(model, graph, keep)
        assert (check.passed, check.unproved) == (True, ("a",))
        assert str(check).endswith("groups that by nature change the others are not part of it (1)")
        assert check.to_json()["unproved"] == ["a"]
        assert culprits(model, graph, keep) == []


def test_a_net_that_no_longer_runs_is_as_wrong_as_can_be():
    model = Net(lambda net, x: net.b(net.a(x).reshape(2, [4, 8][net.a(x).shape[1] // 4], 8, 8) if net.a(x).shape[1] < 4
                                     else net.a(x)), a=conv(3, 4), b=conv(4, 2))  # fmt: skip
    graph = trace(model, IMAGE)
    keep = graph.keep_all()
    keep[0] = False
    check = self_check(model, graph, keep)
    assert check.max_relative_error == float("inf")
    assert not check.passed


def test_not_a_number_fails():
    assert not SelfCheck(float("nan")).passed
    model = nn.Sequential(conv(3, 4), conv(4, 2))
    with torch.no_grad():
        model[1].bias[0] = float("nan")
    graph = trace(model, IMAGE)
    keep = graph.keep_all()
    keep[0] = False
    assert not self_check(model, graph, keep).passed


@pytest.mark.parametrize("first", [True, False])
def test_not_a_number_in_one_of_several_outputs_fails(first: bool):
    """The other output, compared before or after, is right."""

    def forward(net: Net, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = net.a(x)
        good, bad = net.b(y), net.b(y) + net.nan
        return (bad, good) if first else (good, bad)

    model = Net(forward, a=conv(3, 4), b=conv(4, 2), nan=torch.full((1, 1, 1), float("nan")))
    graph = trace(model, IMAGE)
    keep = graph.keep_all()
    keep[0] = False
    check = self_check(model, graph, keep)
    assert check.max_relative_error != check.max_relative_error
    assert not check.passed


def test_outputs_that_are_whole_numbers_prove_nothing():
    model = Net(lambda net, x: net.b(net.a(x)).argmax(1), a=conv(3, 4), b=conv(4, 2))
    graph = trace(model, IMAGE)
    keep = graph.keep_all()
    keep[0] = False
    with pytest.raises(ConvpareError, match="the model returns no floating-point numbers"):
        self_check(model, graph, keep)


def test_result_prints_and_serialises():
    assert str(SelfCheck(3.2e-16)) == "self-check passed: relative error 3.2e-16 (tolerance 1e-09)"
    assert str(SelfCheck(0.25)) == "self-check FAILED: relative error 2.5e-01 (tolerance 1e-09)"
    assert SelfCheck(1e-9).passed
    assert not SelfCheck(1.1e-9).passed
    assert SelfCheck(0.5).to_json() == {
        "passed": False, "max_relative_error": 0.5, "tolerance": 1e-9, "unproved": [], "narrow": None,
        "rounding": None,
    }  # fmt: skip


def test_zeroed_by_hand():
    torch.manual_seed(0)
    model = nn.Sequential(conv(3, 4), nn.BatchNorm2d(4), nn.Sigmoid(), conv(4, 2)).eval()
    graph = trace(model, IMAGE)
    keep = graph.keep_all()
    keep[[0, 3]] = False
    dense = zeroed(model, graph, keep)
    for tensor in (
        dense[0].weight,
        dense[0].bias,
        dense[1].weight,
        dense[1].running_var,
        dense[3].weight.movedim(1, 0),
    ):
        assert not tensor[[0, 3]].any()
        assert tensor[[1, 2]].any()
    assert torch.equal(dense[3].bias, model[3].bias)
    small = removed(model, graph, keep)
    assert torch.equal(small[0].weight, model[0].weight[[1, 2]])
    assert torch.equal(small[3].weight, model[3].weight[:, [1, 2]])
    x = torch.randn(2, 3, 8, 8)
    hand = model[0](x)
    hand = torch.sigmoid(model[1](hand))[:, [1, 2]]
    hand = torch.conv2d(hand, model[3].weight[:, [1, 2]], model[3].bias)
    assert torch.allclose(small(x), hand, atol=1e-6)


def test_keeping_all_changes_nothing():
    torch.manual_seed(0)
    model = nn.Sequential(conv(3, 4), nn.ReLU(), conv(4, 2))
    graph = trace(model, IMAGE)
    same = removed(model, graph, graph.keep_all())
    assert [torch.equal(a, b) for a, b in zip(model.parameters(), same.parameters(), strict=True)] == [True] * 4
    assert self_check(model, graph, graph.keep_all()).max_relative_error == 0.0


def test_a_net_without_removable_channels():
    model = nn.Sequential(conv(3, 2))
    graph = trace(model, IMAGE)
    assert (graph.channels, graph.groups, graph.units) == (0, (), {})
    assert self_check(model, graph, graph.keep_all()).max_relative_error == 0.0
    assert [p.shape for p in removed(model, graph, graph.keep_all()).parameters()] == [(2, 3, 1, 1), (2,)]


def test_a_forward_that_writes_out_float32_is_checked_by_its_operators():
    """It does not run in float64 itself; its captured graph does."""
    torch.manual_seed(0)
    model = Net(lambda net, x: net.b(net.a(x).float()), a=conv(3, 4), b=conv(4, 2))
    for form in WHOLE:
        graph = trace(model, IMAGE, form)
        assert graph.channels == 4
        keep = graph.keep_all()
        keep[1] = False
        check = self_check(model, graph, keep)
        assert 0 <= check.max_relative_error < 1e-12
        assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_a_forward_that_cannot_run_in_float64_is_not_blamed_on_the_surgery():
    model = Net(lambda net, x: net.b(net.a(x).half()), a=conv(3, 4), b=conv(4, 2).half())
    graph = trace(model, IMAGE)
    assert graph.channels == 4
    with pytest.raises(ConvpareError, match=r"Net cannot be self-checked: .* in float64 it does not run"):
        self_check(model, graph, graph.keep_all())


def test_a_forward_that_draws_numbers():
    model = Net(lambda net, x: net.b(net.a(x) + torch.rand(1, 1, 8, 8)), a=conv(3, 4), b=conv(4, 2))
    graph = trace(model, IMAGE)
    keep = graph.keep_all()
    keep[0] = False
    state = torch.get_rng_state()
    assert self_check(model, graph, keep).passed
    assert torch.equal(torch.get_rng_state(), state)


def test_outputs_without_tensors_are_passed_over():
    model = Net(lambda net, x: (net.b(net.a(x)), None, {"scale": 2, "name": "x"}), a=conv(3, 4), b=conv(4, 2))
    graph = trace(model, IMAGE)
    keep = graph.keep_all()
    keep[0] = False
    assert self_check(model, graph, keep).passed


def test_outputs_that_are_no_tensors_are_refused_by_name():
    class Result:
        pass

    torch.utils._pytree.register_pytree_node(Result, lambda r: ([r.x], None), lambda xs, _: _result(Result, xs[0]))
    model = Net(lambda net, x: _result(Result, net.b(net.a(x))), a=conv(3, 4), b=conv(4, 2))
    graph = trace(model, IMAGE)
    keep = graph.keep_all()
    keep[0] = False
    with pytest.raises(ConvpareError, match="the model returns a Result; expected tensors in tuples, lists or dicts"):
        self_check(model, graph, keep)


def _result(kind: type, x: torch.Tensor) -> object:
    made = kind()
    made.x = x
    return made


def magnifying(steps: int) -> nn.Module:
    """A chaotic map at the end, which doubles every rounding in each step."""

    def forward(net: Net, x: torch.Tensor) -> torch.Tensor:
        y = net.b(net.a(x)).sigmoid()
        for _ in range(steps):
            y = 4 * y * (1 - y)
        return y

    torch.manual_seed(0)
    return Net(forward, a=conv(3, 8), b=conv(8, 2))


def error_when_narrow(model: nn.Module, share: float) -> None:
    """A relative error that only the smaller net makes."""
    model.b.register_forward_pre_hook(lambda module, args: args[0] * (1 + share * (args[0].shape[1] < 8)))


@pytest.mark.parametrize(("steps", "error"), [(26, 3e-16), (0, 1e-6)])
def test_a_failure_says_what_roundings_alone_do(steps: int, error: float):
    """A network that magnifies them fails, too, but its last bits do as much; in a sound one they do nothing."""
    model = magnifying(steps)
    graph = trace(model, IMAGE)
    error_when_narrow(model, error)
    keep = graph.keep_all()
    keep[::2] = False
    check = self_check(model, graph, keep)
    assert not check.passed and check.tolerance == 1e-9
    assert [g.name for g in culprits(model, graph, keep)] == ["a"]
    assert check.rounding is not None and f"{check.rounding:.1e}" in str(check)
    assert (check.rounding > check.max_relative_error / 100) is (steps > 0)
    assert self_check(model, graph, graph.keep_all()).rounding is None
