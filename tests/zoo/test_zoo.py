"""A sample of `make zoo`: one model of many families, in both forms, in two minutes at most.

Each is captured, loses 30 % of every group, and is exact; and no less of it can be pruned than is written here.
"""

import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("torchvision", exc_type=ImportError)
pytest.importorskip("timm", exc_type=ImportError)

ROOT = Path(__file__).parent.parent.parent
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests" / "graph")]
from checks import random_keep  # noqa: E402 - zoo knows where it is

import zoo  # noqa: E402 - a script, which is no package
from convpare.graph import self_check, trace  # noqa: E402
from convpare.graph.structure import FORMS, Form  # noqa: E402
from convpare.planning.cost import prunable_share  # noqa: E402

# model → share of the MACs that hang on removable channels: in the module form, in the graph form
SAMPLE: dict[str, tuple[float, float]] = {
    "timm:ghostnet_050": (1, 1),
    "timm:inception_next_atto": (0.998, 0.998),
    "timm:mixnet_s": (1, 1),
    "timm:rexnet_100": (1, 1),
    "timm:skresnet18": (0.924, 1),
    "timm:test_nfnet": (0.002, 1),
    "timm:test_vit": (0.832, 0.832),
    "timm:test_resnet": (1, 1),
    "timm:mobilevit_xxs": (1, 1),
    "timm:efficientvit_b0": (0.986, 0.986),
    "timm:resnetv2_18": (1, 1),
    "timm:fastvit_t8": (1, 1),
    "timm:eca_botnext26ts_256": (0.999, 0.999),
    "torchvision:shufflenet_v2_x0_5": (1, 1),
    "torchvision:squeezenet1_1": (1, 1),
    "torchvision:mnasnet0_5": (1, 1),
    "torchvision:lraspp_mobilenet_v3_large": (1, 1),
}
EXPECTED_FAILURES: dict[tuple[str, Form], str] = {}  # may only shrink: what stands here and passes is an error


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", SAMPLE)
def test_a_model_of_the_zoo(name: str, form: Form, request: pytest.FixtureRequest):
    if (name, form) in EXPECTED_FAILURES:
        request.applymarker(pytest.mark.xfail(reason=EXPECTED_FAILURES[name, form], strict=True))
    zoo.import_zoos()
    torch.manual_seed(0)
    model, inputs = zoo.prepared(name)
    graph = trace(model, inputs, form=form)
    assert prunable_share(graph) >= SAMPLE[name][FORMS.index(form)] - 1e-3
    check = self_check(model, graph, random_keep(graph, 0))
    assert check.passed, check
