"""The main job on real networks and real images: the figures that docs/results promises."""

import json
from pathlib import Path

import pytest

from convpare.cli import main

pytestmark = pytest.mark.real


def run(line: str, found: Path) -> dict:
    try:
        main([*line.split(), "--json", str(found)])
    except SystemExit as stop:
        assert not stop.code
    return json.loads(found.read_text())


def test_half_of_resnet56_by_calibration_alone(shared, tmp_path):
    """Half of the MACs, no labels, no gradients, the whole test set: at least 88.3 %."""
    given = f"--weights {shared}/weights/resnet56-cifar10.safetensors --data cifar10:{shared}/data/cifar10"
    line = f"compress convpare:resnet56 {given} --macs 0.5 --criterion reconstruction --no-sweep -o {tmp_path}/half"
    found = run(line, tmp_path / "half.json")
    assert found["before"]["params"] == 853_018
    assert found["before"]["macs"] == 125_485_696
    assert found["before"]["top1"] == pytest.approx(93.39, abs=0.005)
    assert found["after"]["macs"] <= 0.5 * 125_485_696
    assert found["self_check"]["passed"]
    assert found["after"]["top1"] >= 88.3
    assert found["after"]["top1"] > found["stages"][1]["top1"] + 30
    again = run(f"evaluate {tmp_path}/half --data cifar10:{shared}/data/cifar10", tmp_path / "again.json")
    assert again["images"] == 10_000
    assert again["top1"] == found["after"]["top1"]


def test_three_quarters_of_mobilenet(shared, tmp_path):
    """MobileNetV1-0.25 on 500 ImageNet validation images of ten classes, calibrated on training images of these."""
    given = f"--weights {shared}/weights/mobilenet_v1_025-imagenet.safetensors --data {shared}/data/imagenet-calib"
    test = f"--test {shared}/data/imagenet500"
    line = f"compress convpare:mobilenet_v1_025 {given} {test} --macs 0.75 --no-sweep -o {tmp_path}/small"
    found = run(line, tmp_path / "small.json")
    assert found["before"]["top1"] == pytest.approx(52.0)
    assert found["test_images"] == 500
    assert found["achieved"]["macs"] <= 0.75
    assert found["after"]["top1"] >= 48.0
