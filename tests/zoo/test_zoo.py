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
from convpare.graph import removed, self_check, trace, zeroed  # noqa: E402
from convpare.graph.structure import Form  # noqa: E402
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


@pytest.mark.parametrize("form", zoo.FORMS)
@pytest.mark.parametrize("name", SAMPLE)
def test_a_model_of_the_zoo(name: str, form: Form, request: pytest.FixtureRequest):
    if (name, form) in EXPECTED_FAILURES:
        request.applymarker(pytest.mark.xfail(reason=EXPECTED_FAILURES[name, form], strict=True))
    zoo.import_zoos()
    torch.manual_seed(0)
    model, inputs = zoo.prepared(name)
    graph = trace(model, inputs, form=form)
    assert prunable_share(graph) >= SAMPLE[name][zoo.FORMS.index(form)] - 1e-3
    check = self_check(model, graph, random_keep(graph, 0))
    assert check.passed, check


def test_a_detector_captured_in_parts():
    """Its feature maps lose channels, too, in the linked form; what it finds in a picture is the same."""
    zoo.import_zoos()
    model, inputs = zoo.prepared("torchvision:ssdlite320_mobilenet_v3_large")
    graph = trace(model, inputs, form="linked")
    assert [(part.name, len(part.links), len(part.inner)) for part in graph.parts] == [
        ("backbone", 0, 6),
        ("head", 6, 0),
    ]
    assert prunable_share(graph) == 1
    keep = random_keep(graph, 0)
    check = self_check(model, graph, keep)
    assert check.passed, check
    dense, small = zeroed(model, graph, keep).double(), removed(model, graph, keep).double()
    picture = [x.double() for x in inputs]
    found = zoo.outputs(dense, picture)
    assert [tuple(x.shape) for x in found] == [(300, 4), (300,)]  # boxes and scores
    assert zoo.difference(found, zoo.outputs(small, picture)) <= 1e-12
