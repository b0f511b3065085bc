"""The command, as a clumsy user meets it."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from convpare.artifact import load_artifact, read_record
from convpare.blocks.digits import digits_net
from convpare.planning.plan import load_plan


def test_the_artifact_holds_what_a_report_needs(made):
    record = read_record(made.artifact)
    origin = record.origin
    assert origin["commands"][0].startswith("convpare compress convpare:digits --weights ")
    assert origin["images"] == "digits: held out every fifth image of each class for testing (355 of 1797 images)"
    assert origin["weights"]["file"] == str(made.folder / "digits.safetensors")
    assert sum(sheet["macs_after"] for sheet in origin["network"]["layers"]) == record.plan.after.macs
    assert load_artifact(made.artifact).origin == origin


def test_the_page_as_json(made):
    page = json.loads((made.folder / "page.json").read_text())
    record = read_record(made.artifact)
    tops = [stage["top1"] for stage in page["stages"]]
    assert tops == [stage["top1"] for stage in record.figures["stages"]]
    assert page["curve"]["chosen"][2] == pytest.approx(record.plan.error)
    assert page["check"]["error"] == record.figures["self_check"]["max_relative_error"]
    assert all(pair["removed"] for pair in page["pairs"])


def test_the_trade_off_is_stored_and_drawn(made, tmp_path):
    page, sweep = tmp_path / "page.json", read_record(made.artifact).figures["sweep"]
    assert made.run("report", made.artifact, "-o", tmp_path / "page.html", "--json", page) == 0
    curve = json.loads(page.read_text())["curve"]
    assert curve["points"] == [[s["achieved"]["macs"], s["achieved"]["params"], s["error"]] for s in sweep["steps"]]
    assert len(curve["points"]) == 10 and curve["chosen"] == curve["points"][-1]
    assert [step["requested"]["macs"] for step in sweep["steps"]] == pytest.approx([1 - n / 20 for n in range(1, 11)])
    assert (made.artifact / "plan.json").stat().st_size < 200_000


def test_without_a_trade_off(made, tmp_path):
    how = ("--criterion", "l2", "--recover", "none")
    for name, more in (("none", ("--macs", 0.5, "--no-sweep")), ("threshold", ("--threshold", 0.5))):
        assert made.run("compress", *made.model, *how, *more, "-o", tmp_path / name) == 0
        assert read_record(tmp_path / name).figures["sweep"] is None
        page = tmp_path / "page.json"
        assert made.run("report", tmp_path / name, "-o", tmp_path / "page.html", "--json", page) == 0
        assert json.loads(page.read_text())["curve"] is None


def test_beside_the_artifact_without_images(made, capsys):
    artifact = made.folder / "other"
    shutil.copytree(made.artifact, artifact)
    assert made.run("report", f"{artifact}/") == 0
    page = made.folder / "other.html"
    assert capsys.readouterr().out.strip() == f"report: {page}"
    assert "Feature maps that resemble" not in page.read_text()
    assert made.run("report", artifact) == 0  # a page of ours is replaced
    page.write_text("something else")
    assert made.run("report", artifact) == 1
    assert page.read_text() == "something else"
    assert {path.name for path in artifact.iterdir()} == {"model.safetensors", "plan.json"}


def refused(made, capsys, *arguments: object) -> str:
    assert made.run("report", *arguments, "-o", made.folder / "refused.html") == 1
    assert not (made.folder / "refused.html").exists()
    found = capsys.readouterr().err
    assert "Traceback" not in found
    return " ".join(found.split())


def test_what_is_wrong_is_said(made, capsys, tmp_path):
    assert "an artifact is a folder with" in refused(made, capsys, tmp_path)
    assert made.run("report", tmp_path / "no" / "such") == 1
    assert "there is no file" in " ".join(capsys.readouterr().err.split())
    (tmp_path / "s.json").write_text("{}")
    assert "that is no sweep" in refused(made, capsys, made.artifact, "--sweep", tmp_path / "s.json")
    (tmp_path / "s.json").write_text("[" * 100_000)
    assert "cannot be read as JSON" in refused(made, capsys, made.artifact, "--sweep", tmp_path / "s.json")
    assert "cannot be read as JSON" in refused(made, capsys, made.artifact, "--sweep", tmp_path / "none.json")
    weights = made.folder / "digits.safetensors"
    assert "name it with --teacher" in refused(made, capsys, made.artifact, "--weights", weights)
    assert "--mean is about images" in refused(made, capsys, made.artifact, "--mean", "0.5")
    other = ("--teacher", "convpare:resnet20")
    assert "the plan was made for DigitsNet, and does not suit this network" in refused(
        made, capsys, made.artifact, *other
    )
    inside = made.run("report", made.artifact, "-o", made.artifact / "r.html")
    assert inside == 1


def test_images_need_the_original(made, capsys, tmp_path):
    """Its weights are found where they were, if they are still the same; else the user is asked for them."""
    torch.manual_seed(0)
    weights, artifact = tmp_path / "w.safetensors", tmp_path / "small"
    save_file(digits_net().state_dict(), weights)
    of = ("convpare:digits", "--weights", weights, "--macs", 0.5, "--criterion", "l2", "--recover", "none")
    assert made.run("compress", *of, "-o", artifact) == 0
    page = tmp_path / "r.html"
    shown = ("--data", "digits", "--images", 8, "-o", page)
    assert made.run("report", artifact, *shown) == 0
    assert "Feature maps that resemble" in page.read_text()
    weights.rename(tmp_path / "moved.safetensors")
    capsys.readouterr()
    assert made.run("report", artifact, *shown) == 1
    assert "--teacher MODEL and its --weights" in " ".join(capsys.readouterr().err.split())
    named = ("--teacher", "convpare:digits", "--weights", tmp_path / "moved.safetensors")
    assert made.run("report", artifact, *named, *shown) == 0
    save_file(digits_net().state_dict(), weights)
    assert made.run("report", artifact, *shown) == 1  # there, but others


def test_of_a_plan_that_merges(made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text(
        """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.expand = nn.Conv2d(1, 6, 3, padding=1), nn.Conv2d(6, 24, 1, bias=False)
        self.reduce, self.last, self.fc = nn.Conv2d(24, 8, 1), nn.Conv2d(8, 8, 3), nn.Linear(8, 10)

    def forward(self, x):
        x = self.reduce(self.expand(self.first(x).relu())).relu()
        return self.fc(self.last(x).relu().mean((2, 3)))

def make():
    torch.manual_seed(0)
    return Net()
"""
    )
    of = ("net.py:make", "--data", "digits", "--merge", "--macs", 0.5, "--images", 32, "--recover", "none")
    assert made.run("compress", *of, "-o", "small") == 0
    stored = read_record("small")
    assert [merge.expansion for merge in stored.plan.merges] == ["expand"]
    shown = ("--teacher", "net.py:make", "--data", "digits", "--images", 16, "--json", "page.json")
    assert made.run("report", "small", *shown) == 0
    page = json.loads(Path("page.json").read_text())
    layers = {sheet["name"]: sheet["macs_after"] for sheet in page["network"]["layers"]}
    assert layers["expand"] == 0 and sum(layers.values()) == stored.plan.after.macs
    assert layers == {sheet["name"]: sheet["macs_after"] for sheet in stored.origin["network"]["layers"]}
    assert {pair["group"] for pair in page["pairs"]} <= {edit.group for edit in stored.plan.edits}
    assert all(pair["removed"] for pair in page["pairs"]) and page["pairs"]


def test_of_a_plan_that_was_applied_and_of_what_was_recovered(made, tmp_path):
    plan, applied, better = (tmp_path / name for name in ("plan.json", "applied", "better"))
    fast = ("--epochs", 1, "--train-images", 64, "--recover-images", 64)
    assert made.run("plan", *made.model, "--macs", 0.6, "-o", plan) == 0
    assert made.run("apply", made.model[0], plan, *made.model[1:], "--recover", "none", "-o", applied) == 0
    given = ("--teacher", *made.model)
    assert made.run("recover", applied, *given, *fast, "-o", better) == 0
    assert made.run("report", better, "--json", tmp_path / "page.json") == 0
    page = json.loads((tmp_path / "page.json").read_text())
    assert [stage["stage"] for stage in page["stages"]][:2] == ["original", "after surgery"]
    assert page["stages"][-1]["stage"] == "after training"
    commands = [said for term, said in page["made"] if term == "Command"]
    assert [command.split()[1] for command in commands] == ["apply", "recover"]
    assert "without labels" in dict(page["made"])["Recovery later"]
    after = [q["after"] for q in page["quantities"] if q["kind"] == "macs"]
    assert after == [load_plan(plan).after.macs]
    assert Path(tmp_path / "better.html").is_file()
