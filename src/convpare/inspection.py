"""What a network consists of, what of it could go, and why the rest could not."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.export import ExportedProgram

from convpare.data import Data, ImageSet
from convpare.errors import ConvpareError
from convpare.graph.capture import CannotCapture, Inputs, as_args, capture
from convpare.graph.probe import FOLLOWS_NOT
from convpare.graph.structure import Form, Graph
from convpare.graph.trace import trace
from convpare.notebook import html_table
from convpare.planning.cost import Count, count_graph, prunable_share
from convpare.planning.planner import calibration_images
from convpare.redundancy.activations import GroupActivations, measure_activations
from convpare.redundancy.gallery import pairs_picture
from convpare.redundancy.kernels import ENERGY, KernelRedundancy, measure_kernels
from convpare.redundancy.kr import Block, kr_blocks
from convpare.redundancy.network_complexity import NetworkComplexity, network_complexity
from convpare.redundancy.similarity import removal_order

Tell = Callable[[str, int, int], None]

SIMILAR = 0.9  # SSIM from which two feature maps count as similar


@dataclass(frozen=True)
class Inspection:
    """The structure of a network with its costs.

    Attributes:
        graph: groups, layers, frozen channels.
        count: MACs, parameters and activations by layer and in total.
        kernels: by layer, how much of its kernel repeats itself across every cut; layers whose weight is computed from
            parameters are missing.
        energy: the share of a kernel's squared norm that a chain of two layers was asked to keep.
        blocks: K/R of every block; None for a network that is captured in parts.
        complexity: the numbers that the network stores, and how many of them data must determine; None likewise.
        activations: with images: by group, how much its feature maps repeat each other; None without images.
        graph_form: the share of the MACs that hang on removable channels in the graph form, where the module's forward
            keeps some from going; else None.
    """

    graph: Graph
    count: Count
    kernels: Mapping[str, KernelRedundancy]
    energy: float
    blocks: tuple[Block, ...] | None = None
    complexity: NetworkComplexity | None = None
    activations: Mapping[str, GroupActivations] | None = None
    graph_form: float | None = None

    @property
    def factorizable(self) -> float:
        """The share of the MACs that goes when each layer is the cheapest chain that keeps what was asked."""
        saved = sum(kernel.dense.macs - kernel.least_macs for kernel in self.kernels.values())
        return saved / max(self.count.total.macs, 1)

    @property
    def prunable(self) -> float:
        """The share of the MACs that hang on channels which can be removed."""
        return prunable_share(self.graph)

    def to_json(self) -> dict[str, Any]:
        structure = self.graph.to_json()
        layers = structure.pop("layers")
        groups = structure.pop("groups")
        assert isinstance(layers, list) and isinstance(groups, list)
        costs = self.count.to_json()
        return {
            **structure,
            **self.count.total.to_json(),
            "prunable_share": {
                self.graph.form: self.prunable,
                f"{self.graph.form}_marked": prunable_share(self.graph, marked=True),
                **({} if self.graph_form is None else {"graph": self.graph_form}),
            },
            "factorizable_share": self.factorizable,
            "blocks": None if self.blocks is None else [block.to_json() for block in self.blocks],
            "complexity": None if self.complexity is None else self.complexity.to_json(),
            "layers": [{**layer, **costs["layers"][layer["name"]], **self._kernel(layer["name"])} for layer in layers],  # type: ignore[index]
            "groups": [{**group, "activations": self._activations(group["name"])} for group in groups],
        }

    def _repr_html_(self) -> str:
        """As a notebook shows it."""
        shapes = " ".join("×".join(map(str, shape)) for shape in self.graph.inputs)
        title = f"{self.graph.model} on {shapes}: {100 * self.prunable:.1f} % of the MACs hang on removable channels"
        layers = [(x.name, x.kind, "×".join(map(str, self.graph.shapes[x.weight])), *self._costs(x.name))
                  for x in self.graph.layers]  # fmt: skip
        total = ("total", "", "", self.count.total.macs, self.count.total.params, f"{100 * self.factorizable:.0f} %")
        columns = ("layer", "kind", "weight", "MACs", "parameters", "best chain saves")
        measured = self.activations is not None
        groups = [(g.name, g.channels, *([f"{100 * self.similar(g.name):.0f} %"] if measured else []))
                  for g in self.graph.groups]  # fmt: skip
        names = ("group", "channels", *(["similar"] if measured else []))
        return html_table(columns, [*layers, total], title) + html_table(names, groups)

    def _costs(self, layer: str) -> tuple[int, int, str]:
        cost, kernel = self.count.layers[layer], self.kernels.get(layer)
        saved = "" if kernel is None or kernel.cut is None else f"{100 * kernel.saved:.0f} % {kernel.cut}"
        return cost.macs, cost.params, saved

    def similar(self, group: str) -> float:
        """The share of a group's channels that go when of every two with an SSIM of 0.9 or more one is dropped."""
        assert self.activations is not None
        found = self.activations[group]
        return int((removal_order(found.ssim).scores >= SIMILAR).sum()) / found.channels

    def _activations(self, group: str) -> dict[str, Any] | None:
        if self.activations is None:
            return None
        return {"similar": self.similar(group), **self.activations[group].to_json()}

    def _kernel(self, layer: str) -> dict[str, Any]:
        return self.kernels[layer].to_json() if layer in self.kernels else {"cuts": None}


def inspect(
    model: nn.Module,
    example_inputs: Inputs,
    data: Data | ImageSet | Tensor | None = None,
    *,
    images: int = 256,
    form: Form = "module",
    energy: float = ENERGY,
    on_progress: Tell | None = None,
) -> Inspection:
    """Trace `model`, count it, measure its kernels, and with images its activations.

    Args:
        form: "module", "graph" or "linked", see `trace`.
        energy: the share of a kernel's squared norm that a chain of two layers must keep to take its place.

    Raises:
        ConvpareError: the model cannot be captured, its weights are no numbers, or the images do not suit it.
    """
    tell = on_progress or (lambda *_: None)
    tell("tracing", 0, 1)
    program = _captured(model, example_inputs)
    graph = trace(model, example_inputs, form=form, program=program)
    bound = form != "graph" and program is not None and any(FOLLOWS_NOT in row.reason for row in graph.frozen)
    graph_form = prunable_share(trace(model, example_inputs, form="graph")) if bound else None
    kernels = measure_kernels(model, graph, energy, lambda done, total: tell("measuring kernels", done, total))
    tell("finding blocks", 0, 1)
    blocks = None
    if program is not None:
        blocks = tuple(_with_ranks(kr_blocks(model, example_inputs, program), kernels))
    complexity = None if blocks is None else network_complexity(graph, blocks)
    activations = None
    if (shown := calibration_images(data, images, 0)) is not None:
        activations = measure_activations(
            model, graph, shown, on_progress=lambda done, total: tell("comparing feature maps", done, total)
        )
    return Inspection(graph, count_graph(graph), kernels, energy, blocks, complexity, activations, graph_form)


def _captured(model: nn.Module, example_inputs: Inputs) -> ExportedProgram | None:
    """The whole model, if it can be captured."""
    try:
        return capture(model, as_args(example_inputs))
    except CannotCapture:
        return None


def _with_ranks(blocks: Sequence[Block], kernels: Mapping[str, KernelRedundancy]) -> Iterator[Block]:
    """The blocks with the ranks of their last layers' trained weights."""
    for block in blocks:
        kernel = kernels.get(block.layers[-1])
        yield block if kernel is None else replace(block, trained_rank=kernel.output_rank)


def write_gallery(
    model: nn.Module,
    found: Inspection,
    images: Tensor,
    folder: Path,
    *,
    pairs: int = 5,
    on_progress: Tell | None = None,
) -> list[Path]:
    """Pictures of the most similar feature maps of every group of an inspection with images, as PNG files.

    Args:
        images: (n, channels, *spatial), preprocessed; the first three are shown.
        pairs: how many of each group, by SSIM.

    Raises:
        ConvpareError: there were no images, a file cannot be written, or Pillow is missing.
    """
    if found.activations is None:
        raise ConvpareError("the inspection looked at no images, so there are no feature maps to show; give images")
    written = []
    for done, group in enumerate(found.graph.groups):
        if on_progress is not None:
            on_progress("drawing feature maps", done, len(found.graph.groups))
        shown = found.activations[group.name].pairs["ssim"][:pairs]
        if shown:
            written.append(folder / f"{group.name.replace('/', '-')}.png")
            pairs_picture(model, found.graph, group.name, images, shown, written[-1])
    return written
