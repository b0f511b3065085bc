"""The cost of two layers in place of one, against layers that are built and counted."""

import math

import pytest
import torch
from torch import nn

from convpare.graph import trace
from convpare.planning.cost import count
from convpare.redundancy.chain_cost import chain_cost, dense_cost
from convpare.redundancy.cuts import Cut, Kernel, cuts_of

NETS = {
    "strided and padded": (nn.Conv2d(6, 8, 3, stride=2, padding=1), (2, 6, 9, 11)),
    "oblong": (nn.Conv2d(6, 8, (3, 5), stride=(1, 2), padding=(2, 0)), (1, 6, 9, 11)),
    "grouped": (nn.Conv2d(6, 9, 3, groups=3), (1, 6, 8, 8)),
    "1-D": (nn.Conv1d(4, 6, 5, stride=3), (1, 4, 20)),
    "3-D": (nn.Conv3d(4, 6, (2, 3, 2), stride=(1, 2, 2)), (1, 4, 6, 7, 8)),
    "linear": (nn.Linear(7, 5), (3, 7)),
}


def two_layers(layer: nn.Module, cut: Cut, rank: int) -> nn.Sequential:
    """The chain as plain layers, whatever their weights."""
    if isinstance(layer, nn.Linear):
        return nn.Sequential(nn.Linear(7, rank, bias=False), nn.Linear(rank, 5, bias=False))
    n = len(layer.kernel_size)
    letters, kind = ("", "w", "hw", "dhw")[n], (nn.Conv1d, nn.Conv2d, nn.Conv3d)[n - 1]
    into, out, groups = layer.in_channels, layer.out_channels, layer.groups
    if cut.splits_channels:
        mine, widths, own = (cut.left if "i" in cut.left else cut.right), (into, rank, out), groups
    else:
        mine, widths, own = (cut.right if "o" in cut.left else cut.left), (into, rank * into, out), into
    first = [c in mine for c in letters]

    def conv(at: int, chosen: list[bool], g: int) -> nn.Module:
        def pick(values, plain):
            return tuple(v if take else plain for v, take in zip(values, chosen, strict=True))

        return kind(
            widths[at], widths[at + 1], pick(layer.kernel_size, 1), pick(layer.stride, 1), pick(layer.padding, 0),
            groups=g, bias=False,
        )  # fmt: skip

    return nn.Sequential(conv(0, first, own), conv(1, [not f for f in first], groups))


@pytest.mark.parametrize("name", NETS)
def test_as_counted(name: str):
    layer, shape = NETS[name]
    x = torch.zeros(shape)
    (traced,) = trace(nn.Sequential(layer), x).layers
    groups = getattr(layer, "groups", 1)
    kernel = Kernel.of(layer.weight, groups)
    whole = dense_cost(kernel, traced.extents)
    assert (whole.macs, whole.params) == (count(nn.Sequential(layer), x).total.macs, layer.weight.numel())
    for cut in cuts_of(kernel.dimensions):
        for rank in (1, 2, 3):
            cost = chain_cost(kernel, cut, rank, traced.extents)
            chain = two_layers(layer, cut, cost.rank)
            assert cost.rank == (groups * math.ceil(rank / groups) if cut.splits_channels else rank)
            found = count(chain, x).total
            assert (cost.macs, cost.params) == (found.macs, found.params), cut.name
            assert chain(x).shape == layer(x).shape


def test_transposed():
    layer, x = nn.ConvTranspose2d(6, 8, 3, stride=2), torch.zeros(1, 6, 5, 7)
    (traced,) = trace(nn.Sequential(layer), x).layers
    kernel = Kernel.of(layer.weight, transposed=True)
    chain = nn.Sequential(
        nn.ConvTranspose2d(6, 4, (1, 3), (1, 2), bias=False), nn.ConvTranspose2d(4, 8, (3, 1), (2, 1), bias=False)
    )
    cost = chain_cost(kernel, Cut.parse("oh|iw"), 4, traced.extents, transposed=True)
    assert chain(x).shape == layer(x).shape
    assert cost.macs == count(chain, x).total.macs == 6 * 4 * 3 * 35 + 4 * 8 * 3 * 5 * 15
    assert cost.form == "1×3 6→4, 3×1 4→8"
    assert dense_cost(kernel, traced.extents, transposed=True).macs == 6 * 8 * 9 * 35


def test_forms_are_spelled():
    kernel = Kernel.of(torch.ones(8, 6, 3, 3))
    forms = {cut.name: chain_cost(kernel, cut, 2, ()).form for cut in cuts_of(2)}
    assert forms == {
        "o|ihw": "3×3 6→2, 1×1 2→8",
        "i|ohw": "1×1 6→2, 3×3 2→8",
        "h|oiw": "3×1 6→12, 1×3 12→8",
        "w|oih": "1×3 6→12, 3×1 12→8",
        "oi|hw": "3×3 6→12, 1×1 12→8",
        "oh|iw": "1×3 6→2, 3×1 2→8",
        "ow|ih": "3×1 6→2, 1×3 2→8",
    }
