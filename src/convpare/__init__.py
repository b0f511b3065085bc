"""Find what a convolutional network does not need, remove it, prove that the result is right, and say what it cost."""

__version__ = "0.1.0"

from convpare.apply import apply
from convpare.artifact import load, load_artifact, save
from convpare.compress import Compression, CompressOptions, compress
from convpare.data import load_data
from convpare.errors import ConvpareError
from convpare.evaluation import evaluate
from convpare.export import export_int8, export_onnx, export_pt2, export_torch
from convpare.graph import Graph, trace
from convpare.planning.cost import count
from convpare.planning.plan import Plan, load_plan
from convpare.planning.planner import Planner, plan
from convpare.planning.settings import PlanOptions
from convpare.planning.solver import Budget
from convpare.recovery import RecoverOptions, recover
from convpare.zoo import load_model

__all__ = [
    "Budget", "CompressOptions", "Compression", "ConvpareError", "Graph", "Plan", "PlanOptions", "Planner",
    "RecoverOptions", "apply", "compress", "count", "evaluate", "export_int8", "export_onnx", "export_pt2",
    "export_torch", "load", "load_artifact", "load_data", "load_model", "load_plan", "plan", "recover", "save", "trace",
]  # fmt: skip
