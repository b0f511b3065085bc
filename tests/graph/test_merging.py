"""Expansions merged into what reads them: the same function, the parameters and MACs as predicted, and the refusals."""

import json
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from checks import Witness, assert_attributes_true, outputs, randomise, relative_difference
from nets import Net, conv
from torch import Tensor, nn

from convpare.errors import ConvpareError
from convpare.graph import merging
from convpare.graph.capture import capture
from convpare.graph.flow import Flow
from convpare.graph.merging import Merge, merge_, mergeable, merged, not_mergeable
from convpare.planning.cost import count

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
BATCH_NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
IMAGES = (2, 3, 6, 6)


def assert_merges(model: nn.Module, shape: tuple[int, ...], expected: list[tuple]) -> nn.Module:
    """(expansion, norm, consumers, k, r) are found; merged, the net is the same function at the cost predicted."""
    torch.manual_seed(0)
    randomise(model).double()
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    dense, witness = outputs(model, (x,)), Witness(model)
    merges = mergeable(model, x)
    assert [(m.expansion, m.norm, m.consumers, m.k, m.r) for m in merges] == expected
    small = merged(model, merges, x)
    witness.assert_untouched()
    for a, b in zip(dense, outputs(small, (x,)), strict=True):
        assert relative_difference(a, b) <= 1e-12
    assert_attributes_true(small)
    before, after = count(model, x).total, count(small, x).total
    assert sum(m.params for m in merges) == before.params - after.params
    assert sum(m.macs for m in merges) == before.macs - after.macs
    assert [m.training for m in small.modules()] == [m.training for m in model.modules()]
    for name in (n for m in merges for n in (m.expansion, m.norm) if n):
        assert isinstance(small.get_submodule(name), nn.Identity)
    return small


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_an_expansion_goes_in_every_number_of_dimensions(dims: int):
    convolution = CONVOLUTIONS[dims]
    model = nn.Sequential(
        convolution(3, 4, 3), convolution(4, 12, 1, bias=False), convolution(12, 5, 3, padding=1), nn.ReLU()
    )  # fmt: skip
    small = assert_merges(model, (2, 3, *[6] * dims), [("1", None, ("2",), 12, 4)])
    (merge,) = mergeable(model, torch.zeros(2, 3, *[6] * dims).double())
    assert merge.params == 4 * 12 + 8 * 5 * 3**dims
    assert merge.macs == 2 * 4**dims * merge.params  # all positions of a 4-wide image, twice
    assert small[2].weight.shape == (5, 4, *[3] * dims)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_a_batch_norm_goes_with_it(dims: int):
    """Its constant goes into the bias of what reads it, which pads nothing."""
    convolution, norm = CONVOLUTIONS[dims], BATCH_NORMS[dims]
    model = nn.Sequential(nn.ReLU(), convolution(3, 10, 1), norm(10), convolution(10, 6, 3))
    assert_merges(model, (2, 3, *[5] * dims), [("1", "2", ("3",), 10, 3)])


def test_a_bias_is_made_where_a_constant_comes_in():
    model = nn.Sequential(nn.ReLU(), conv(3, 10), conv(10, 6, 3, bias=False))
    small = assert_merges(model, IMAGES, [("1", None, ("2",), 10, 3)])
    (merge,) = mergeable(model, torch.zeros(IMAGES).double())
    assert merge.params == 3 * 10 + 10 + 7 * 6 * 9 - 6
    h, w = model[1].bias.detach(), model[2].weight.detach()
    assert torch.allclose(small[2].bias, torch.einsum("okxy,k->o", w, h), rtol=1e-12)


def test_a_constant_does_not_pass_a_padded_border():
    model = nn.Sequential(nn.ReLU(), conv(3, 10), conv(10, 6, 3, padding=1))
    x = torch.zeros(IMAGES)
    assert mergeable(model, x) == []
    assert not_mergeable(model, x) == {"1": "its bias or batch norm adds a constant, but 2 pads the border with zeros"}
    nn.init.zeros_(model[1].bias)
    assert [m.expansion for m in mergeable(model, x)] == ["1"]
    assert not_mergeable(model, x) == {}


def test_a_constant_of_zero_passes_a_padded_border():
    model = nn.Sequential(nn.ReLU(), conv(3, 10), nn.BatchNorm2d(10), conv(10, 6, 3, padding=1))
    nn.init.zeros_(model[1].bias)
    x = torch.randn(IMAGES, generator=torch.Generator().manual_seed(0))
    (merge,) = mergeable(model, x)
    assert relative_difference(outputs(model, (x,))[0], outputs(merged(model, [merge], x), (x,))[0]) <= 1e-5
    model[2].running_mean.fill_(0.1)
    assert mergeable(model, x) == []


@pytest.mark.parametrize(
    ("options", "passes"),
    [
        ({"kernel_size": 3, "padding": "valid"}, True),
        ({"kernel_size": 1, "padding": "same"}, True),
        ({"kernel_size": 3, "padding": "same"}, False),
        ({"kernel_size": (3, 1), "padding": (0, 1)}, False),
        ({"kernel_size": 3, "stride": 2, "dilation": 2}, True),
    ],
)
def test_padding_in_all_its_spellings(options: dict, passes: bool):
    model = nn.Sequential(nn.ReLU(), conv(3, 8), nn.Conv2d(8, 4, **options))
    expected = [("1", None, ("2",), 8, 3)] if passes else []
    assert_merges(model, IMAGES, expected)


def test_several_layers_read_it():
    def forward(net: Net, x: Tensor) -> Tensor:
        y = net.bn(net.h(F.relu(x)))
        return torch.cat([net.a(y).flatten(1), net.b(y).flatten(1), net.c(y).flatten(1)], 1)

    parts = {"a": conv(8, 4), "b": conv(8, 5, 3, stride=2, bias=False), "c": conv(8, 2, (1, 3), dilation=2)}
    model = Net(forward, h=conv(3, 8, bias=False), bn=nn.BatchNorm2d(8), **parts)
    small = assert_merges(model, IMAGES, [("h", "bn", ("a", "b", "c"), 8, 3)])
    assert small.b.bias is not None


def test_one_layer_that_cannot_take_it_keeps_it_for_all():
    def forward(net: Net, x: Tensor) -> Tensor:
        y = net.h(F.relu(x))
        return net.a(y) + net.b(y)

    model = Net(forward, h=conv(3, 8), a=conv(8, 4), b=conv(8, 4, groups=2))
    assert mergeable(model, torch.zeros(IMAGES)) == []
    assert not_mergeable(model, torch.zeros(IMAGES))["h"] == "b, which reads it, is grouped"


def test_a_grouped_expansion_is_one_matrix_of_blocks():
    model = nn.Sequential(conv(3, 6, 3), nn.ReLU(), conv(6, 18, groups=3), nn.BatchNorm2d(18), conv(18, 5, 3))
    small = assert_merges(model, IMAGES, [("2", "3", ("4",), 18, 6)])
    assert small[4].weight.shape == (5, 6, 3, 3)


def test_linear_layers():
    model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 9), nn.BatchNorm1d(9), nn.Linear(9, 3))
    assert_merges(model, (5, 6), [("2", "3", ("4",), 9, 4)])
    tokens = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 9), nn.Linear(9, 3, bias=False))
    assert_merges(tokens, (5, 7, 6), [("2", None, ("3",), 9, 4)])


def tucker(c_in: int, c_out: int, kernel: int, ranks: tuple[int, int], **options: object) -> nn.Sequential:
    inner = conv(*ranks, kernel, padding=kernel // 2, bias=False, **options)
    return nn.Sequential(conv(c_in, ranks[0], bias=False), inner, conv(ranks[1], c_out))


def test_tucker_blocks_in_a_row_hand_on_the_rank_instead_of_the_channels():
    """K drops out: two nets that differ in K alone are of the same size once merged."""
    sizes = set()
    for k in (8, 16, 32):
        model = nn.Sequential(tucker(3, k, 3, (3, 4)), tucker(k, k, 3, (5, 6)), nn.Flatten(), nn.Linear(k * 36, 2))
        small = assert_merges(model, IMAGES, [("0.2", None, ("1.0",), k, 4)])
        sizes.add(count(small[:2], torch.zeros(IMAGES).double()).total.params - k * 7)
    assert len(sizes) == 1


def test_expansions_in_a_row_go_one_after_the_other():
    model = nn.Sequential(conv(3, 4, 3), nn.ReLU(), conv(4, 8), conv(8, 16), conv(16, 5, 3))
    small = assert_merges(model, IMAGES, [("2", None, ("3",), 8, 4)])
    smaller = assert_merges(small, IMAGES, [("3", None, ("4",), 16, 4)])
    assert smaller[4].weight.shape == (5, 4, 3, 3)
    x = torch.zeros(IMAGES).double()
    both = list(merging.mergeable_in(Flow(model, capture(model, x)))[0].values())
    assert [m.expansion for m in both] == ["2", "3"]
    with pytest.raises(ConvpareError, match="'3' is in two merges"):
        merged(model, both, x)


def test_a_reduction_is_no_expansion():
    model = nn.Sequential(nn.ReLU(), conv(3, 2), conv(2, 8, 3))
    assert mergeable(model, torch.zeros(IMAGES)) == []
    assert not_mergeable(model, torch.zeros(IMAGES)) == {}


class Own(nn.Conv2d):
    """A layer with a forward of its own, perhaps."""


def tied() -> Net:
    net = Net(lambda net, x: net.z(net.h(F.relu(x))) + net.y(net.g(F.relu(x))), h=conv(3, 8), g=conv(3, 8))
    net.z, net.y = conv(8, 2), conv(8, 2)
    net.g.weight = net.h.weight
    return net


def tied_to_one_that_does_not_run() -> Net:
    net = Net(lambda net, x: net.z(net.h(F.relu(x))), h=conv(3, 8), g=conv(3, 8), z=conv(8, 2))
    net.g.weight = net.h.weight
    return net


def after(middle: Callable[..., Tensor], z: nn.Module | None = None, **parts: nn.Module | Tensor) -> Net:
    """`middle(net, h(relu(x)))` → z, where h is an expansion to 8 channels."""
    everything = {"h": conv(3, 8), "z": z or conv(8, 2), **parts}
    return Net(lambda net, x: net.z(middle(net, net.h(F.relu(x)))), **everything)


def stands(operator: str) -> str:
    return f"{operator} stands between it and the next linear layer"


OWN = "h is not an nn.Conv or nn.Linear of its own that is called once"
REFUSALS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "activation": (lambda: after(lambda n, y: F.relu(y)), stands("relu")),
    "norm and activation": (
        lambda: after(lambda n, y: F.gelu(n.bn(y)), bn=nn.BatchNorm2d(8)),
        stands("gelu"),
    ),
    "sum": (lambda: after(lambda n, y: y + n.s(y), s=conv(8, 8)), stands("add")),
    "its shape is read": (
        lambda: Net(
            lambda n, x: n.z(y := n.h(F.relu(x))) + n.a(x.repeat(1, 3, 1, 1)[:, :8].view_as(y)), h=conv(3, 8),
            z=conv(8, 2), a=conv(8, 2),
        ),
        stands("view_as"),
    ),
    "scale": (lambda: after(lambda n, y: y * 2), stands("mul")),
    "pooling": (lambda: after(lambda n, y: F.avg_pool2d(y, 2)), stands("avg_pool2d")),
    "output": (
        lambda: Net(lambda n, x: (n.z(y := n.h(F.relu(x))), y), h=conv(3, 8), z=conv(8, 2)),
        stands("output"),
    ),
    "another axis": (
        lambda: after(lambda n, y: y, nn.Linear(6, 2)),
        "z reads its output along another axis",
    ),
    "transposed": (
        lambda: after(lambda n, y: y, nn.ConvTranspose2d(8, 2, 3)),
        OWN.replace("h", "z", 1),
    ),
    "no module": (
        lambda: Net(lambda n, x: n.z(F.conv2d(F.relu(x), n.h)), h=torch.ones(8, 3, 1, 1), z=conv(8, 2)),
        OWN,
    ),
    "the module is not called": (
        lambda: Net(lambda n, x: n.z(F.conv2d(F.relu(x), n.h.weight)), h=conv(3, 8), z=conv(8, 2)),
        OWN,
    ),
    "class of its own": (lambda: after(lambda n, y: y, h=Own(3, 8, 1)), OWN),
    "weight norm": (
        lambda: after(lambda n, y: y, h=nn.utils.parametrizations.weight_norm(conv(3, 8))),
        OWN,
    ),
    "called twice": (
        lambda: Net(lambda n, x: n.z(n.h(F.relu(x))) + n.z(n.h(F.relu(-x))), h=conv(3, 8), z=conv(8, 2)),
        OWN,
    ),
    "tied": (tied, OWN),
    "tied to one that does not run": (tied_to_one_that_does_not_run, OWN),
    "stride": (lambda: after(lambda n, y: y, h=conv(3, 8, stride=2)), "it has a stride or padding"),
    "padding": (lambda: after(lambda n, y: y, h=conv(3, 8, padding=1)), "it has a stride or padding"),
    "statistics of the batch": (
        lambda: after(lambda n, y: n.bn(y), bn=nn.BatchNorm2d(8, track_running_stats=False)),
        "the batch norm after it takes its statistics from the batch",
    ),
    "shared norm": (
        lambda: Net(
            lambda n, x: n.z(n.bn(n.h(F.relu(x)))) + n.y(n.bn(n.g(F.relu(x)))),
            h=conv(3, 8), g=conv(3, 8, 3, padding=1), bn=nn.BatchNorm2d(8), z=conv(8, 2), y=conv(8, 2),
        ),
        "the batch norm after it is not an nn.BatchNorm of its own that is called once",
    ),
    "in place": (
        lambda: Net(
            lambda n, x: n.z(n.h(y := n.a(x)) + 0 * F.relu_(y).sum()), a=conv(3, 3, 3), h=conv(3, 8), z=conv(8, 2)
        ),
        "what it reads is changed in place",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSALS)
def test_what_cannot_be_merged_is_said_why(name: str):
    build, reason = REFUSALS[name]
    model = build()
    assert mergeable(model, torch.zeros(IMAGES)) == []
    assert not_mergeable(model, torch.zeros(IMAGES))["h"] == reason


def test_a_batch_norm_over_positions_of_tokens_is_not_one_over_channels():
    model = nn.Sequential(nn.ReLU(), nn.Linear(6, 9), nn.BatchNorm1d(9), nn.Linear(9, 3))
    reason = "the batch norm after it normalises another axis than its channels"
    assert not_mergeable(model, torch.zeros(5, 9, 6)) == {"1": reason}
    assert [m.norm for m in mergeable(model, torch.zeros(5, 6))] == ["2"]


def test_merges_are_plain_data():
    model = nn.Sequential(conv(3, 2), nn.ReLU(), conv(2, 8), nn.BatchNorm2d(8), conv(8, 4, 3))
    (merge,) = mergeable(model, torch.zeros(IMAGES))
    data = json.loads(json.dumps(merge.to_json()))
    assert data == {
        "expansion": "2", "norm": "3", "consumers": ["4"], "biases": [], "k": 8, "r": 2,
        "params": 2 * 8 + 8 + 8 + 8 + 6 * 4 * 9, "macs": 2 * (36 * 16 + 16 * 6 * 4 * 9),
    }  # fmt: skip
    assert Merge(**{**data, "consumers": tuple(data["consumers"]), "biases": tuple(data["biases"])}) == merge
    assert hash(merge) == hash(mergeable(model, torch.zeros(IMAGES))[0])


def test_merged_weights_load_into_a_fresh_model_merged_alike():
    """Though a constant of the fresh model is zero where the trained one's is not."""

    def build() -> nn.Module:
        expansion = (conv(2, 8, bias=False), nn.BatchNorm2d(8))
        return nn.Sequential(conv(3, 2), nn.ReLU(), *expansion, conv(8, 4, bias=False))

    model = randomise(build()).double()
    x = torch.randn(IMAGES, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    merges = mergeable(model, x)
    assert [m.biases for m in merges] == [("4",)]
    small, fresh = merged(model, merges, x), build().double()
    merge_(fresh, merges)
    fresh.load_state_dict(small.state_dict(), strict=True)
    assert torch.equal(outputs(small, (x,))[0], outputs(fresh, (x,))[0])
    with torch.device("meta"):
        hollow = build()
    merge_(hollow, merges)
    assert [tuple(p.shape) for p in hollow.parameters()] == [tuple(p.shape) for p in small.parameters()]


def test_a_merge_must_be_one_of_this_model_as_it_is_now():
    model = nn.Sequential(conv(3, 2), nn.ReLU(), conv(2, 8, bias=False), nn.BatchNorm2d(8), conv(8, 4, 3, padding=1))
    x = torch.zeros(IMAGES)
    merges = mergeable(model, x)
    assert [m.expansion for m in merges] == ["2"]
    model[3].bias.data[5] = 0.25
    with pytest.raises(ConvpareError, match="'2' cannot be merged into 4: its bias or batch norm adds a constant"):
        merged(model, merges, x)
    with pytest.raises(ConvpareError, match="'2' cannot be merged into 4: the model has no such expansion"):
        merged(nn.Sequential(conv(3, 2), nn.ReLU()), merges, x)


def test_a_merge_that_fails_the_proof_changes_nothing(monkeypatch: pytest.MonkeyPatch):
    model = nn.Sequential(conv(3, 2), nn.ReLU(), conv(2, 8), conv(8, 4, 3))
    x = torch.zeros(IMAGES)
    merges, witness = mergeable(model, x), Witness(model)
    affine = merging._affine
    monkeypatch.setattr(merging, "_affine", lambda *layers: (affine(*layers)[0] * (1 + 1e-6), affine(*layers)[1]))
    with pytest.raises(ConvpareError, match="the model with 2 merged is another function: relative error"):
        merged(model, merges, x)
    witness.assert_untouched()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_types_and_gradients_stay(dtype: torch.dtype, tolerance: float):
    torch.manual_seed(0)
    model = randomise(nn.Sequential(conv(3, 2), nn.ReLU(), conv(2, 8), nn.BatchNorm2d(8), conv(8, 4, 3, bias=False)))
    model[4].requires_grad_(False)
    model.to(dtype)
    x = torch.randn(IMAGES, generator=torch.Generator().manual_seed(0)).to(dtype)
    small = merged(model, mergeable(model, x), x)
    assert {p.dtype for p in small.parameters()} == {dtype}
    assert [p.requires_grad for p in small.parameters()] == [True, True, False, False]
    assert relative_difference(outputs(model, (x,))[0], outputs(small, (x,))[0]) <= tolerance


def test_on_meta_tensors_a_constant_counts_as_there():
    with torch.device("meta"):
        model = nn.Sequential(conv(3, 2), nn.ReLU(), conv(2, 8), conv(8, 4, 3))
        padded = nn.Sequential(conv(3, 2), nn.ReLU(), conv(2, 8), conv(8, 4, 3, padding=1))
        x = torch.zeros(IMAGES)
    assert [m.expansion for m in mergeable(model, x)] == ["2"]
    assert mergeable(padded, x) == []
