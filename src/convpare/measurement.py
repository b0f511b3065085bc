"""What a compression cost and saved, measured: file size and latency beside accuracy, MACs and parameters."""

import platform
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import torch as safetensors
from torch import Tensor, nn

from convpare import __version__
from convpare.compress import Compression
from convpare.jsonable import finite
from convpare.timing import side_by_side


@dataclass(frozen=True)
class Measured:
    """A compression's figures with the size of the weights' file and the median latency, before and after."""

    content: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        return self.content


def measured(original: nn.Module, done: Compression, example: Tensor) -> Measured:
    """Time both networks side by side on `example` and measure their weights' files."""
    content: dict[str, Any] = finite(done.to_json())
    times = side_by_side([original, done.model], [example])
    for side, model, milliseconds in zip(("before", "after"), (original, done.model), times, strict=True):
        content[side]["file_bytes"] = file_bytes(model)
        content[side]["latency_ms"] = round(milliseconds, 4)
    content["measured_on"] = {
        "device": str(example.device), "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(), "batch": len(example), "torch": torch.__version__, "convpare": __version__,
    }  # fmt: skip
    return Measured(content)


def file_bytes(model: nn.Module) -> int:
    """The size of the safetensors file with all parameters and buffers, each tied one once."""
    stored: dict[str, Tensor] = {}
    memory: set[int] = set()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        plain = tensor.detach().contiguous()
        place = plain.untyped_storage().data_ptr()
        stored[name] = plain.clone() if place in memory else plain  # a view of another one is stored like any other
        memory.add(place)
    return len(safetensors.save(stored))
