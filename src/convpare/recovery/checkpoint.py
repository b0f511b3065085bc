"""The state of a training in one file, which replaces the one before at once: tensors and JSON, nothing pickled."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors import torch as safetensors
from torch import Tensor

from convpare.errors import ConvpareError

FORMAT = "convpare training 2"


def write_checkpoint(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Store tensors by name, on whatever device, and what else there is to say."""
    own = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}  # tied ones share memory
    new = path.with_name(path.name + ".new")
    try:
        with new.open("wb") as file:
            file.write(safetensors.save(own, {"format": FORMAT, "about": json.dumps(about)}))
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)
    except BaseException:  # interrupted, or a full disk
        new.unlink(missing_ok=True)
        raise


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `write_checkpoint` stored. Raises ConvpareError if it is damaged or anything else."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no dictionary
        if metadata.get("format") != FORMAT:
            raise ConvpareError(f"{path} is no checkpoint of a training; give another path or delete it.")
        about = json.loads(metadata["about"])
        if not isinstance(about, dict):
            raise ValueError("no object")
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise ConvpareError(f"the checkpoint {path} is damaged ({error}); delete it to start anew.") from error
    return tensors, about
