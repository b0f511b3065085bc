"""The verbs as commands. The only room that knows argument parsing."""

import atexit
import gc
import io
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated

try:
    import cyclopts
    from cyclopts import Parameter
    from cyclopts.validators import Number
except ImportError as error:  # pragma: no cover - the wheel alone
    raise SystemExit(f"the command line needs more packages: pip install convpare[cli] ({error})") from error

import torch
from torch import Tensor

from convpare import __version__, terminal
from convpare.artifact import load_artifact, read_record, save
from convpare.bench import bench
from convpare.blocks.digits import train_digits
from convpare.cli import reports
from convpare.cli.arguments import (
    IMAGES,
    RECOVERY,
    ArtifactName,
    BudgetArguments,
    CompressionArguments,
    Count,
    CountOrNone,
    DataArguments,
    ExportArguments,
    FormArgument,
    InspectionArguments,
    JsonFile,
    MethodArguments,
    ModelArguments,
    ModelName,
    Original,
    PlanName,
    PlanResultArguments,
    PlotFile,
    QSFMArguments,
    RecoveryArguments,
    ReportArguments,
    ReportFile,
    ResultArguments,
    Share,
    Teacher,
    TestedDataArguments,
    TimingArguments,
    TracedModelArguments,
    TrainingArguments,
    TruncationArguments,
)
from convpare.cli.files import check_json, check_output, check_plot, check_report, write_json
from convpare.cli.models import Opened, about, artifact_of, example_of, open_data, open_model, open_to_time
from convpare.cli.reports import facts, of_original, origin_of, read_sweep, recovered_origin
from convpare.cli.together import together
from convpare.compress import Compression, CompressOptions, carry_through, compress
from convpare.data import Data, load_data
from convpare.errors import ConvpareError
from convpare.evaluation import evaluate
from convpare.export import CheckOptions, export
from convpare.importance import get_criterion
from convpare.inspection import inspect, write_gallery
from convpare.measurement import Measured, measured
from convpare.planning.plan import load_plan
from convpare.planning.planner import Planner, calibration_images
from convpare.planning.settings import check_methods
from convpare.prospect import STEPS, prospect, trade_off
from convpare.recovery.processes import OfOneProcess, current
from convpare.redundancy.kernels import ENERGY
from convpare.regain import regain
from convpare.report import (
    gallery,
    report_of_artifact,
    report_of_inspection,
    report_of_truncation,
    theory_figure,
    trade_off_figure,
    truncation_figure,
    write_figure,
    write_report,
)
from convpare.theory import TheoryOptions, theory
from convpare.truncate import truncate

app = cyclopts.App(
    name="convpare",
    help="Find what a convolutional network does not need, remove it, prove that the result is right, and say what it "
    "cost.\n\nExit codes: 0, 1 (one message says what is wrong), 130 (interrupted; nothing is half-written).",
    version=__version__,
    suppress_keyboard_interrupt=False,
)


@app.command(name="inspect", sort_key=1)
def inspect_command(
    model: ModelName,
    /,
    *,
    which: TracedModelArguments = TracedModelArguments(),
    data: DataArguments = DataArguments(),
    images: Annotated[Count, Parameter(group=IMAGES, help="images that similarity is measured on")] = 256,
    form: FormArgument = "module",
    energy: Share = ENERGY,
    result: InspectionArguments = InspectionArguments(),
) -> None:
    """What is superfluous, of what kind, and how much could go; with --data, in what the layers put out, too."""
    result.check(data.data)
    data.check()
    shape = which.shape
    with terminal.progress() as tell:
        opened = open_model(model, which, tell)
        shown = open_data(data, opened, tell)
        found = inspect(
            opened.module,
            example_of(shape, opened, shown),
            shown,
            images=images,
            form=form,
            energy=energy,
            on_progress=tell,
        )
        pictured = result.gallery is not None or result.report is not None
        maps_of = calibration_images(shown, images, 0) if pictured else None
        if result.gallery is not None and maps_of is not None:
            write_gallery(opened.module, found, maps_of, result.gallery, on_progress=tell)
        if result.report is not None:
            pairs = () if maps_of is None else gallery(opened.module, found, maps_of)
            write_report(report_of_inspection(found, pairs, facts(opened, shown)), result.report)
    write_json(result.json_file, found.to_json())
    terminal.show_inspection(found)


@app.command(name="compress", sort_key=2)
def compress_command(
    model: ModelName,
    /,
    *,
    result: CompressionArguments,
    budget: BudgetArguments = BudgetArguments(),
    which: TracedModelArguments = TracedModelArguments(),
    data: TestedDataArguments = TestedDataArguments(),
    method: MethodArguments = MethodArguments(),
    qsfm: QSFMArguments = QSFMArguments(),
    recovery: RecoveryArguments = RecoveryArguments(),
) -> None:
    """Plan, remove, check, recover, and save the smaller network as an artifact."""
    for arguments in (result, data):
        arguments.check()
    fractions, shape = budget.budget, which.shape
    settings = method.options(budget, qsfm.options(method.criterion))
    check_methods(settings, method.criterion)
    checkpoint = recovery.checkpoint(result.output)
    steps = STEPS if result.sweep else 0
    options = CompressOptions(settings, recovery.options(method.seed), data.limit, method.form, checkpoint, steps)
    _check_images(data, method.criterion, recovery.recover)
    processes = current()
    with terminal.progress() as tell:
        with processes.main_first():
            opened = open_model(model, which, tell)
            images = open_data(data, opened, tell, data.test)
            example = example_of(shape, opened, images)
        done = compress(
            opened.module, example, images, macs=fractions.macs, params=fractions.params, criterion=method.criterion,
            options=options, on_progress=tell,
        )  # fmt: skip
        figures = processes.once(lambda: _finished(opened, done, example, images, result, checkpoint, tell))
    terminal.show_compression(done, figures, result.output, images.note if images else None)


@app.command(name="plan", sort_key=3)
def plan_command(
    model: ModelName,
    /,
    *,
    budget: BudgetArguments = BudgetArguments(),
    which: TracedModelArguments = TracedModelArguments(),
    data: DataArguments = DataArguments(),
    method: MethodArguments = MethodArguments(),
    qsfm: QSFMArguments = QSFMArguments(),
    result: PlanResultArguments = PlanResultArguments(),
) -> None:
    """What would go, what it would save and what error it would add, before anything is changed."""
    for arguments in (result, data):
        arguments.check()
    fractions, shape = budget.budget, which.shape
    if result.sweep and not fractions.fractions:
        raise ConvpareError("--sweep goes from the dense network to a budget: give --macs or --params, no --threshold")
    settings = method.options(budget, qsfm.options(method.criterion))
    check_methods(settings, method.criterion)
    _check_images(data, method.criterion)
    with terminal.progress() as tell:
        opened = open_model(model, which, tell)
        images = open_data(data, opened, tell)
        tell("tracing", 0, 1)
        planner = Planner(
            opened.module, example_of(shape, opened, images), images, criterion=method.criterion, options=settings,
            form=method.form,
        )  # fmt: skip
        if result.sweep:
            curve = trade_off(planner, fractions, on_progress=tell)
        else:
            made = prospect(planner, fractions, tell)
    if result.sweep:
        write_json(result.json_file, curve.to_json())
        if result.plot is not None:
            write_figure(trade_off_figure(curve), result.plot)
        terminal.show_trade_off(curve)
    else:
        write_json(result.json_file, made.to_json())
        write_json(result.output, made.plan.to_json())
        terminal.show_prospect(made)


@app.command(name="apply", sort_key=4)
def apply_command(
    model: ModelName,
    plan: PlanName,
    /,
    *,
    result: ResultArguments,
    which: ModelArguments = ModelArguments(),
    data: TestedDataArguments = TestedDataArguments(),
    recovery: RecoveryArguments = RecoveryArguments(),
    seed: Annotated[int, Parameter(group=RECOVERY, validator=Number(gte=0, lt=2**63), help="of the images")] = 0,
) -> None:
    """Carry out a plan on the MODEL that it was made for: remove, check, recover, and save as an artifact."""
    for arguments in (result, data):
        arguments.check()
    checkpoint = recovery.checkpoint(result.output)
    options = CompressOptions(recover=recovery.options(seed), test_limit=data.limit, checkpoint=checkpoint)
    _check_images(data, None, recovery.recover)
    processes = current()
    with terminal.progress() as tell:
        with processes.main_first():
            wanted = load_plan(plan)
            opened = open_model(model, which, tell)
            images = open_data(data, opened, tell, data.test)
        done = carry_through(opened.module, wanted, images, options=options, on_progress=tell)
        example = example_of(wanted.inputs[0], opened, None)
        figures = processes.once(lambda: _finished(opened, done, example, images, result, checkpoint, tell))
    terminal.show_compression(done, figures, result.output, images.note if images else None)


@app.command(name="recover", sort_key=5)
def recover_command(
    artifact: ArtifactName,
    /,
    *,
    teacher: Teacher,
    result: ResultArguments,
    which: ModelArguments = ModelArguments(),
    data: TestedDataArguments = TestedDataArguments(),
    recovery: TrainingArguments = TrainingArguments(),
    seed: Annotated[int, Parameter(group=RECOVERY, validator=Number(gte=0, lt=2**63), help="of the images")] = 0,
) -> None:
    """Win back the accuracy of an artifact: train it to put out what the original does, and save it."""
    for arguments in (result, data):
        arguments.check()
    checkpoint = recovery.checkpoint(result.output)
    options = CompressOptions(recover=recovery.options(seed), test_limit=data.limit, checkpoint=checkpoint)
    if data.data is None or options.recover is None:
        raise ConvpareError("recover needs images, and a way: give --data, and no --recover none")
    processes = current()
    with terminal.progress() as tell:
        with processes.main_first():
            found = artifact_of(artifact, which)
            if found.plan is None:
                raise ConvpareError(f"{artifact} was saved without a plan: nothing tells how it came from the original")
            opened = open_model(teacher, replace(which, model=None), tell)
            images = open_data(data, opened, tell, data.test)
            assert images is not None
        done = regain(found.module, opened.module, images, found.plan, options, tell)

        def finish() -> None:
            tell("saving", 0, 1)
            figures = {**found.figures, "regained": done.to_json()}
            save(
                done.model, result.output, plan=found.plan, spec=found.spec, preprocessing=images.preprocessing,
                figures=figures, origin=recovered_origin(found.origin) if found.origin else None,
            )  # fmt: skip
            _forget(checkpoint)
            write_json(result.json_file, done.to_json())

        processes.once(finish)
    terminal.show_regained(done, result.output)


@app.command(name="evaluate", sort_key=6)
def evaluate_command(
    model: ModelName,
    /,
    *,
    which: ModelArguments = ModelArguments(),
    data: DataArguments = DataArguments(),
    limit: Annotated[CountOrNone, Parameter(group=IMAGES, help="show only so many, a fixed random choice")] = None,
    json_file: JsonFile = None,
) -> None:
    """Accuracy of a model or an artifact on the test images of DATA (on all of them, where it has no test split)."""
    check_json(json_file)
    if data.data is None:
        raise ConvpareError("evaluate needs labelled images: give --data")
    with terminal.progress() as tell:
        opened = open_model(model, which, tell)
        images = open_data(data, opened, tell)
        assert images is not None
        found = evaluate(
            opened.module, images.evaluation, limit=limit,
            on_progress=lambda done, total: tell("accuracy", done, total),
        )  # fmt: skip
    write_json(json_file, found.to_json())
    terminal.show(str(found))


@app.command(name="export", sort_key=7)
def export_command(
    model: ModelName,
    /,
    *,
    result: ExportArguments = ExportArguments(),
    which: TracedModelArguments = TracedModelArguments(),
    data: TestedDataArguments = TestedDataArguments(),
) -> None:
    """Write a network for use without convpare: as ONNX, as .pt2 or as plain PyTorch, compared before it is kept."""
    result.check(data.data)
    data.check()
    shape, options = which.shape, CheckOptions(result.tolerance)
    with terminal.progress() as tell:
        opened = open_model(model, which, tell)
        images = open_data(data, opened, tell, data.test)
        example = example_of(shape, opened, images)
        known = about(opened, images, example)
        made = export(
            opened.module, example, result.destination, images, about=known, options=options, limit=data.limit,
            on_progress=tell,
        )  # fmt: skip
    write_json(result.json_file, made.to_json())
    terminal.show_export(made)


@app.command(name="bench", sort_key=8)
def bench_command(
    *models: ModelName,
    which: TracedModelArguments = TracedModelArguments(),
    timing: TimingArguments = TimingArguments(),
    json_file: JsonFile = None,
) -> None:
    """Time networks in turn: the first beside the others, as MODEL and what became of it."""
    check_json(json_file)
    if not models:
        raise ConvpareError("bench times networks: give MODEL, and what it is compared with")
    options, shape = timing.options(), which.shape
    with terminal.progress() as tell:
        opened = [open_to_time(model, which, tell) for model in models]
        example = example_of(shape, next((o for o in opened if o.input_shape), opened[0]), None)
        found = bench(dict(zip(_distinct(models), (o.module for o in opened), strict=True)), example, options, tell)
    write_json(json_file, found.to_json())
    terminal.show_bench(found)


def _distinct(names: Sequence[str]) -> list[str]:
    """The names, with numbers where one comes twice."""
    return [
        name if names.count(name) == 1 else f"{name} ({names[:at].count(name) + 1})" for at, name in enumerate(names)
    ]


@app.command(name="truncate", sort_key=9)
def truncate_command(
    model: ModelName,
    /,
    *,
    which: TracedModelArguments = TracedModelArguments(),
    data: DataArguments = DataArguments(),
    truncation: TruncationArguments = TruncationArguments(),
    plot: PlotFile = None,
    report: ReportFile = None,
    json_file: JsonFile = None,
) -> None:
    """Truncate the kernels of a trained network along every cut: norm loss against accuracy, and training again."""
    check_json(json_file)
    check_plot(plot)
    check_report(report)
    if data.data is None:
        raise ConvpareError("truncate measures accuracy and needs labelled images: give --data")
    options, shape = truncation.options(), which.shape
    with terminal.progress() as tell:
        opened = open_model(model, which, tell)
        images = open_data(data, opened, tell)
        assert images is not None
        example = example_of(shape, opened, images)
        found = truncate(opened.module, example, images, options, store=truncation.store, on_progress=tell)
    write_json(json_file, found.to_json())
    if plot is not None:
        write_figure(truncation_figure(found), plot)
    if report is not None:
        write_report(report_of_truncation(found, facts(opened, images)), report)
    terminal.show_truncation(found)


@app.command(name="theory", sort_key=10)
def theory_command(
    *,
    repetitions: Annotated[int, Parameter(validator=Number(gte=2), help="data sets for every point")] = 8,
    seed: Annotated[int, Parameter(validator=Number(gte=0, lt=2**31), help="of the first data set")] = 0,
    store: Annotated[Path | None, Parameter(help="JSON lines that points go to; a rerun goes on with it")] = None,
    plot: PlotFile = None,
    json_file: JsonFile = None,
) -> None:
    """Rerun the statistical experiments: sample complexity against parameters, of CNN, Tucker and CP, for growing K."""
    check_json(json_file)
    check_plot(plot)
    with terminal.progress() as tell:
        found = theory(TheoryOptions(repetitions=repetitions, seed=seed), store, tell)
    write_json(json_file, found.to_json())
    if plot is not None:
        write_figure(theory_figure(found), plot)
    terminal.show(str(found))


@app.command(name="report", sort_key=11)
def report_command(
    artifact: ArtifactName,
    /,
    *,
    result: ReportArguments = ReportArguments(),
    teacher: Original = None,
    which: ModelArguments = ModelArguments(),
    data: DataArguments = DataArguments(),
    images: Annotated[Count, Parameter(group=IMAGES, help="images that feature maps are compared on")] = 64,
) -> None:
    """One page that explains an artifact: what was superfluous, what went, what it cost, how we know it is right."""
    record = read_record(artifact)
    output = result.check(artifact)
    data.check()
    sweep = read_sweep(result.sweep)
    with terminal.progress() as tell:
        network, pairs = of_original(record, teacher, which, data, images, tell)
        made = report_of_artifact(record, network, pairs, sweep)
        write_report(made, output)
    write_json(result.json_file, made.to_json())
    terminal.show(f"report: {output}")


@app.command(sort_key=12)
def demo(*, output: Annotated[Path, Parameter(name=["--output", "-o"])] = Path("demo/digits")) -> None:
    """The whole job in a minute: train a small network on digits, halve its MACs, recover, save, load back.

    Args:
        output: folder of the artifact; an artifact that is there already is replaced
    """
    check_output(output)
    data, example = load_data("digits"), torch.zeros(1, 1, 8, 8)
    with terminal.progress() as tell:
        model, _ = train_digits(on_progress=lambda done, total: tell("training", done, total))
        found = inspect(model, example, data, on_progress=tell)
    terminal.show("A small residual network, trained on 1,442 images of handwritten digits (8x8 pixels).\n")
    terminal.show_inspection(found)
    terminal.show("")
    with terminal.progress() as tell:
        done = compress(model, example, data, macs=0.5, on_progress=tell)
        opened = Opened("convpare:digits", model, "convpare:digits", None, None, random=False)
        figures = _measure_and_save(opened, done, example, data, output, tell)
    terminal.show_compression(done, figures, output, data.note)
    again = evaluate(load_artifact(output).module, data.evaluation)
    terminal.show(f"loaded back from {output}: {again}")
    if again.top1 != done.stages[-1].top1:
        raise ConvpareError(f"the artifact's accuracy {again.top1} differs from {done.stages[-1].top1} before saving")


def _measure_and_save(
    opened: Opened, done: Compression, example: Tensor, data: Data | None, output: Path, tell: terminal.Tell
) -> Measured:
    tell("measuring latency", 0, 1)
    figures = measured(opened.module, done, example)
    origin = origin_of(opened, example, done.plan, data, tell)
    tell("saving", 0, 1)
    preprocessing = data.preprocessing if data else opened.preprocessing
    kept = figures.to_json()
    if data is not None and data.class_names is not None:
        kept["labels"] = list(data.class_names)
    save(
        done.model, output, plan=done.plan, spec=opened.spec, preprocessing=preprocessing, figures=kept, origin=origin,
    )  # fmt: skip
    return figures


def _finished(
    opened: Opened, done: Compression, example: Tensor, data: Data | None, result: ResultArguments,
    checkpoint: Path | None, tell: terminal.Tell,
) -> Measured:  # fmt: skip
    """All that is written at the end."""
    figures = _measure_and_save(opened, done, example, data, result.output, tell)
    _forget(checkpoint)
    write_json(result.json_file, figures.to_json())
    return figures


def _forget(checkpoint: Path | None) -> None:
    if checkpoint is not None:
        checkpoint.unlink(missing_ok=True)


def _check_images(data: DataArguments, criterion: str | None, recover: str = "none") -> None:
    if data.data is None and criterion is not None and get_criterion(criterion).needs_images:
        raise ConvpareError(f"criterion {criterion} looks at feature maps: give images with --data, or --criterion l2")
    if data.data is None and recover != "none":
        raise ConvpareError("recovery needs images: give --data, or --recover none")


@contextmanager
def _exit_codes() -> Iterator[None]:
    try:
        yield
    except (ConvpareError, cyclopts.CycloptsError) as error:
        terminal.fail(str(error).strip(), anyway=isinstance(error, OfOneProcess))
        raise SystemExit(1) from None
    except OSError as error:  # such as a full disk under standard output
        terminal.fail(f"{error}; check the disk and the permissions")
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        terminal.fail("interrupted; nothing is half-written")
        raise SystemExit(130) from None


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point. Exit codes: 0, 1 for a user's error (one message), 130 when interrupted."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # where the terminal's encoding has no × or █
    if arguments is None:  # the process is this command's: torch's modules need not be searched for garbage, 1.4 s
        gc.freeze()
        atexit.register(gc.freeze)
    given = list(arguments) if arguments is not None else sys.argv[1:]
    reports.arguments.set(tuple(given))
    with _exit_codes(), together(given):
        app(given, exit_on_error=False, print_error=False)
