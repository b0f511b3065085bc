"""The network as its captured graph, whatever it was before."""

from torch import Tensor, fx, nn

from convpare.errors import ConvpareError
from convpare.graph.graphform import graph_module
from convpare.graph.portable import to_json
from convpare.graph.trace import trace


def plain_form(model: nn.Module, args: tuple[Tensor, ...]) -> fx.GraphModule:
    """The graph form of a network with all its channels; its tensors are copies. Itself where it is one already.

    Raises:
        ConvpareError: it cannot be captured as a whole, or holds what the graph form cannot.
    """
    if isinstance(model, fx.GraphModule) and _is_portable(model):
        return model
    graph = trace(model, args, form="graph")
    try:
        return graph_module(model, graph, graph.keep_all())
    except SyntaxError as error:  # torch.fx prints a graph as code, with the modules' own names
        raise ConvpareError(
            f"{type(model).__name__} has a module that is named by a word of Python's ({str(error.text).strip()}); "
            "rename it"
        ) from error


def _is_portable(model: fx.GraphModule) -> bool:
    try:
        to_json(model)
    except ConvpareError:
        return False
    return True
