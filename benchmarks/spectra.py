"""How long all cuts of the 53 convolutions of ResNet-50 take, beside plain routes: `python benchmarks/spectra.py`."""

import numpy as np
import torch
from torch import Tensor, nn

from convpare.graph import trace
from convpare.redundancy.cuts import Kernel, cuts_of
from convpare.redundancy.kernels import measure_kernels
from convpare.timing import in_turn
from zoo import import_zoos  # beside this file


def plain_gram(matrix: Tensor) -> Tensor:
    wide = matrix.double()
    return torch.linalg.eigvalsh(wide @ wide.mT if wide.shape[-2] <= wide.shape[-1] else wide.mT @ wide)


def main() -> None:
    import_zoos()
    from torchvision.models import resnet50

    torch.manual_seed(0)
    model = resnet50()
    graph = trace(model, torch.zeros(1, 3, 224, 224))
    model.fc.weight = nn.Parameter(torch.zeros(1000, 1))  # convolutions alone
    kernels = [Kernel.of(m.weight) for m in model.modules() if isinstance(m, nn.Conv2d)]
    matrices = [kernel.unfold(cut) for kernel in kernels for cut in cuts_of(kernel.dimensions)]
    work = {
        "convpare": lambda: measure_kernels(model, graph),
        "float64 Gram matrices": lambda: [plain_gram(matrix) for matrix in matrices],
        "float32 SVD": lambda: [torch.linalg.svdvals(matrix) for matrix in matrices],
    }
    times = np.median(in_turn(list(work.values()), 0, warm_up=1, least=5), 0) / 1000
    print(f"{len(kernels)} convolutions, {len(matrices)} cuts, {torch.get_num_threads()} threads")
    for name, seconds in zip(work, times, strict=True):
        print(f"{name}: {seconds:.2f} s")


if __name__ == "__main__":
    main()
