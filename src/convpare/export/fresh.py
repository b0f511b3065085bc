"""What files compute in a process of their own, in which convpare cannot be imported."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from convpare.errors import ConvpareError

LOAD_PT2 = "run = torch.export.load(path).module()"
LOAD_FOLDER = "sys.path.insert(0, path); import model; run = model.load()"
_SCRIPT = """
import sys
sys.modules["convpare"] = None
sys.dont_write_bytecode = True
import torch
from torch.utils._pytree import tree_leaves
torch.set_num_threads({threads})
path, given, found = sys.argv[1:]
{load}
with torch.no_grad():
    outputs = [
        [x for x in tree_leaves(run(*inputs)) if isinstance(x, torch.Tensor)]
        for inputs in torch.load(given, weights_only=True)
    ]
torch.save(outputs, found)
"""


def outputs_elsewhere(load: str, path: Path, batches: Sequence[tuple[Tensor, ...]]) -> list[list[Tensor]]:
    """What the network in `path` puts out for each of the batches, in a fresh process without convpare.

    Args:
        load: a line of Python that makes `run` of `path`.

    Raises:
        ConvpareError: the process failed; the message has its last line.
    """
    with tempfile.TemporaryDirectory(prefix="convpare-") as folder:
        given, found = Path(folder) / "given", Path(folder) / "found"
        torch.save([tuple(x.contiguous() for x in inputs) for inputs in batches], given)
        script = _SCRIPT.format(load=load, threads=torch.get_num_threads())
        command = [sys.executable, "-c", script, os.path.realpath(path), str(given), str(found)]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        if done.returncode:
            last = (done.stderr.strip() or "no message").splitlines()[-1][:300]
            raise ConvpareError(f"what was exported does not run in a process without convpare: {last}")
        outputs: list[list[Tensor]] = torch.load(found, weights_only=True)
        return outputs
