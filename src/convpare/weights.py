"""Weight files → the parameters of a module. Nothing in a file is ever executed."""

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from convpare.errors import ConvpareError

_NEVER = "Pickles are never executed: only a state dict, saved with torch.save(model.state_dict(), path), is read."

_ADVICE = re.compile("Weights only load failed|Please file an issue|Check the documentation")  # torch's, not ours


def load_weights(module: nn.Module, path: str | Path) -> None:
    """Copy the weights of a file into `module`, which must have exactly the same names and shapes.

    Args:
        module: where the weights go.
        path: `.safetensors`, or `.pt` or `.pth` holding a state dict, be it under the key `state_dict` or `model`, and
            with or without the prefix `module.` of data-parallel training.

    Raises:
        ConvpareError: the file cannot be read without executing it, a name or shape differs, or a weight is not finite.
    """
    state = read_state_dict(Path(path))
    _check_match(str(path), module, state)
    for name, value in state.items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise ConvpareError(f"{path}: {name} holds NaN or infinity; these weights cannot be worked with.")
    module.load_state_dict(state)


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Read the named tensors of a `.safetensors`, `.pt` or `.pth` file onto the CPU.

    Raises:
        ConvpareError: the file is missing, damaged, of another kind, or holds anything that would have to be executed.
    """
    if not path.is_file():
        raise ConvpareError(f"the weights {path} do not exist or are no file; give a .safetensors, .pt or .pth file.")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if path.suffix in (".pt", ".pth"):
        return _plain_names(_find_state_dict(path, _read_torch(path)))
    raise ConvpareError(f"the weights {path} end in {path.suffix!r}; expected .safetensors, .pt or .pth.")


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        state: dict[str, Tensor] = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise ConvpareError(f"the weights {path} are damaged or no safetensors file ({error}).") from error
    return _plain_names(state)


def _read_torch(path: Path) -> object:
    try:
        with warnings.catch_warnings(action="ignore"):  # of pickle protocols; what matters is raised
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files raise whatever the bytes happen to mean; nothing of them has been run
        lines = [line.strip() for line in str(error).splitlines() if line.strip() and not _ADVICE.match(line)]
        reason = (lines or [type(error).__name__])[0][:200]
        raise ConvpareError(f"the weights {path} are damaged or hold more than weights ({reason}). {_NEVER}") from error


def _find_state_dict(path: Path, loaded: object) -> dict[str, Tensor]:
    for key in ("state_dict", "model"):
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
    if not isinstance(loaded, Mapping) or not loaded:
        raise ConvpareError(f"the weights {path} hold a {type(loaded).__name__}, not names and tensors. {_NEVER}")
    for name, value in loaded.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise ConvpareError(
                f"the weights {path} hold no state dict: {name!r} is a {type(value).__name__}, not a tensor. {_NEVER}"
            )
    return dict(loaded)


def _plain_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    if state and all(name.startswith("module.") for name in state):
        return {name.removeprefix("module."): value for name, value in state.items()}
    return state


def _check_match(path: str, module: nn.Module, state: dict[str, Tensor]) -> None:
    own: dict[str, Any] = module.state_dict()
    # A step counter that older files lack and evaluation never reads.
    missing = [name for name in own if name not in state and not name.endswith("num_batches_tracked")]
    unexpected = [name for name in state if name not in own]
    other_shape = [
        f"{name} is {tuple(value.shape)}, expected {tuple(own[name].shape)}"
        for name, value in state.items()
        if isinstance(own.get(name), Tensor) and own[name].shape != value.shape
    ]
    kinds = (("missing", missing), ("unexpected", unexpected), ("of another shape", other_shape))
    problems = [f"{len(names)} {kind}: {', '.join(names[:3])}{_more(names)}" for kind, names in kinds if names]
    if problems:
        raise ConvpareError(
            f"the weights {path} do not fit {type(module).__name__}. {'; '.join(problems)}. "
            "Check the model's name and its number of classes."
        )


def _more(names: list[str]) -> str:
    return ", ..." if len(names) > 3 else ""
