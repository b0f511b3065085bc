"""Importing what the package can do without."""

import importlib
from types import ModuleType

from convpare.errors import ConvpareError


def import_extra(module: str, extra: str) -> ModuleType:
    """Import an optional dependency.

    Args:
        module: the module's dotted name, such as `"PIL.Image"`.
        extra: the extra of this package that installs it: `cli`, `vision`, `onnx`, `report`, `demo` or `train`.

    Raises:
        ConvpareError: it is not installed, or it is a torchvision built for another torch.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConvpareError(
            f"{module} cannot be imported ({error}). It is needed here and optional elsewhere: "
            f"install it with `pip install convpare[{extra}]`."
        ) from error
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        raise ConvpareError(
            f"torchvision is installed for another torch build ({error}). Install the torchvision that belongs "
            "to this torch, from the same package index, and try again."
        ) from error
