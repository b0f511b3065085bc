"""Options of the commands: what may be given, in groups."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Group, Parameter
from cyclopts.validators import Number

from convpare.bench import BenchOptions
from convpare.cli.files import check_destination, check_gallery, check_json, check_output, check_plot, check_report
from convpare.errors import ConvpareError
from convpare.export import TOLERANCE, Destination
from convpare.graph.structure import Form
from convpare.importance import criteria, get_criterion
from convpare.planning.layer_times import Target
from convpare.planning.settings import PlanOptions
from convpare.planning.solver import Budget
from convpare.recovery import TUNINGS, LeastSquares, RecoverOptions, TrainOptions, TuneOptions
from convpare.recovery.objectives import FEATURES
from convpare.recovery.processes import current, several
from convpare.truncate import FRACTIONS, TruncateOptions

RESULT = Group("Result", sort_key=1)
BUDGET = Group("Budget", sort_key=2)
MODEL = Group("Model", sort_key=3)
IMAGES = Group("Images", sort_key=4)
METHOD = Group("Which channels go", sort_key=5)
QSFM = Group("Which channels go, criteria qsfm-ssim and qsfm-psnr", sort_key=6)
RECOVERY = Group("Recovery", sort_key=7)
TRUNCATION = Group("Truncation", sort_key=8)
TIMING = Group("Timing", sort_key=9)

Count = Annotated[int, Parameter(validator=Number(gte=1))]
CountOrNone = Annotated[int | None, Parameter(validator=Number(gte=1))]
ModelName = Annotated[
    str,
    Parameter(
        help="torchvision:NAME, timm:NAME, convpare:NAME, package.module:factory, file.py:factory, or the folder of an "
        "artifact"
    ),
]
FormArgument = Annotated[
    Form,
    Parameter(
        group=METHOD,
        help="module: the model's own class and forward; graph: the captured graph with its numbers rewritten, which "
        "loads without the model's code; linked: of a model that is captured in parts, as module, and the channels go, "
        "too, that one part hands to another as it does on the example",
    ),
]
JsonFile = Annotated[
    Path | None, Parameter(name="--json", group=RESULT, help="write everything that was found to this file, as JSON")
]


Share = Annotated[float, Parameter(help="of a kernel's squared norm that a chain of two layers must keep to count")]
PlanName = Annotated[Path, Parameter(help="the file of a plan, as `convpare plan -o` writes it")]
ArtifactName = Annotated[str, Parameter(help="the folder of an artifact, as `convpare compress -o` writes it")]
Teacher = Annotated[str, Parameter(group=MODEL, help="the MODEL that the artifact was made from, with its weights")]
PlotFile = Annotated[Path | None, Parameter(name="--plot", group=RESULT, help="write a figure to this .html file")]
ReportFile = Annotated[
    Path | None,
    Parameter(name="--report", group=RESULT, help="write a page that explains what was found to this .html file"),
]
Original = Annotated[
    str | None,
    Parameter(group=MODEL, help="the MODEL that the artifact was made from, with its --weights; default: what the "
              "artifact says, where that is at hand"),
]  # fmt: skip


@Parameter(name="*", group=MODEL)
@dataclass(frozen=True)
class ModelArguments:
    """Which model.

    Attributes:
        weights: a .safetensors, .pt or .pth file (weights only; pickled code is never run)
        num_classes: outputs of the classifier, for models that are built by name
        model: the MODEL that an artifact of your own code was made from, such as net.py:make
    """

    weights: Path | None = None
    num_classes: CountOrNone = None
    model: str | None = None


@Parameter(name="*", group=MODEL)
@dataclass(frozen=True)
class TracedModelArguments(ModelArguments):
    """Which model, and for which input.

    Attributes:
        input: shape of the input, batch first, such as 1,3,224,224; default: that of the images, or what is known of
            the model
    """

    input: str | None = None

    @property
    def shape(self) -> tuple[int, ...] | None:
        """The shape that was given."""
        if self.input is None:
            return None
        parts = [part.strip() for part in self.input.split(",")]
        if not all(part.isdecimal() and part.isascii() and int(part) > 0 for part in parts):
            raise ConvpareError(
                f"--input is {self.input!r}; expected whole numbers above 0 with commas between, batch first, such as "
                "1,3,224,224"
            )
        return tuple(int(part) for part in parts)


@Parameter(name="*", group=IMAGES)
@dataclass(frozen=True)
class DataArguments:
    """Which images, and how pixels become inputs (defaults: what the model wants).

    Attributes:
        data: digits, cifar10:FOLDER, cifar100:FOLDER, a folder of class folders or of images, or a .npz file
        mean: subtracted from pixels in [0, 1], one number per channel, such as 0.485,0.456,0.406
        std: divided by, one number per channel
        resize: pixels of the shorter side
        crop: pixels of the central square
        classes: for class folders: a .json file (folder name to index) or a text file (one folder name per line)
    """

    data: str | None = None
    mean: str | None = None
    std: str | None = None
    resize: CountOrNone = None
    crop: CountOrNone = None
    classes: Path | None = None

    def check(self) -> None:
        """Refuse what would be ignored."""
        given = [name for name, value in vars(self).items() if value is not None]
        if self.data is None and given:
            raise ConvpareError(f"{option(given[0])} is about images; say with --data which ones")


@Parameter(name="*", group=IMAGES)
@dataclass(frozen=True)
class TestedDataArguments(DataArguments):
    """Which images, and on which of them accuracy is measured.

    Attributes:
        test: DATA whose images accuracy is measured on, where --data is for calibration alone
        limit: measure accuracy on this many test images only, a fixed random choice
    """

    test: str | None = None
    limit: CountOrNone = None


@Parameter(name="*", group=BUDGET)
@dataclass(frozen=True)
class BudgetArguments:
    """How much goes.

    Attributes:
        macs: MACs that may be left, as a fraction: 0.5 for half
        params: parameters that may be left, as a fraction
        memory: bytes that tensors may take at any time (weights apart), as a fraction
        latency: time that a batch may take, as a fraction, measured on this machine
        runtime: with --latency: eager, compile (torch.compile) or onnxruntime
        batch: with --latency: images in a batch
        threads: with --latency: of the processor; default: what torch takes
        threshold: instead of a budget: remove what the criterion's error rates at or below this (qsfm-ssim: 1 - SSIM)
    """

    macs: float | None = None
    params: float | None = None
    memory: float | None = None
    latency: float | None = None
    runtime: Literal["eager", "compile", "onnxruntime"] | None = None
    batch: CountOrNone = None
    threads: CountOrNone = None
    threshold: float | None = None

    @property
    def budget(self) -> Budget:
        """The budget. Raises ConvpareError where these numbers make no sense."""
        wanted = Budget(self.macs, self.params, self.latency, self.memory)
        if self.threshold is None and not wanted.fractions:
            raise ConvpareError(
                "how much shall go? Give --macs, --params, --memory or --latency (0.5 for half) or several, or "
                "--threshold"
            )
        if self.threshold is not None and wanted.fractions:
            raise ConvpareError(
                "--threshold takes the place of a budget; give it without --macs, --params, --memory and --latency"
            )
        if self.threshold is not None and not 0 <= self.threshold < math.inf:
            raise ConvpareError(f"--threshold is {self.threshold}; expected a finite number, 0 or more, such as 0.1")
        given = [name for name in ("runtime", "batch", "threads") if getattr(self, name) is not None]
        if self.latency is None and given:
            raise ConvpareError(f"{option(given[0])} says where time is measured; give it with --latency")
        return wanted

    @property
    def target(self) -> Target:
        """Where the network is to run."""
        return Target(self.runtime or "eager", self.batch or 1, self.threads)


@Parameter(name="*", group=RESULT)
@dataclass(frozen=True)
class ResultArguments:
    """Where the result goes.

    Attributes:
        output: folder of the artifact; an artifact that is there already is replaced
        json_file: write everything that was measured to this file, as JSON
    """

    output: Annotated[Path, Parameter(name=["--output", "-o"])]
    json_file: Annotated[Path | None, Parameter(name="--json")] = None

    def check(self) -> None:
        """Find out before long work whether both can be written, by the process that does it."""

        def check() -> None:
            check_output(self.output)
            check_json(self.json_file, self.output)

        current().once(check)


@Parameter(name="*", group=RESULT)
@dataclass(frozen=True)
class CompressionArguments(ResultArguments):
    """Where the result goes, and what is kept beside it.

    Attributes:
        sweep: plan for ten budgets on the way to this one, too, and keep the trade-off for the report (of plans by
            --threshold and in --rounds there is none)
    """

    sweep: bool = True


@Parameter(name="*", group=RESULT)
@dataclass(frozen=True)
class PlanResultArguments:
    """Where a plan goes.

    Attributes:
        output: write the plan to this file, as JSON that can be edited and applied
        json_file: write everything that was found to this file, as JSON
        sweep: instead of one plan, ten on the way to the budget: the whole trade-off
        plot: with --sweep: write a figure to this .html file
    """

    output: Annotated[Path | None, Parameter(name=["--output", "-o"])] = None
    json_file: Annotated[Path | None, Parameter(name="--json")] = None
    sweep: Annotated[bool, Parameter(negative="", show_default=False)] = False
    plot: Path | None = None

    def check(self) -> None:
        """Refuse what does not go together, and find out before long work whether the files can be written."""
        if self.sweep and self.output is not None:
            raise ConvpareError("--sweep makes many plans; give it without --output, or with --json for all of them")
        if self.plot is not None and not self.sweep:
            raise ConvpareError("--plot draws the trade-off; give it with --sweep")
        check_json(self.json_file)
        check_json(self.output, option="--output")
        check_plot(self.plot)


@Parameter(name="*", group=RESULT)
@dataclass(frozen=True)
class ExportArguments:
    """What is written: one of the three.

    Attributes:
        onnx: write an ONNX file of this name
        pt2: write a torch.export program to a file of this name, which ends in .pt2
        torch: write a folder of this name: generated code in plain PyTorch, and its weights
        int8: with --onnx and --data: a second file beside it in 8-bit integers, NAME.int8.onnx
        tolerance: the largest difference from torch's outputs, as a share of the largest output
        json_file: write everything that was measured to this file, as JSON
    """

    onnx: Path | None = None
    pt2: Path | None = None
    torch: Path | None = None
    int8: Annotated[bool, Parameter(negative="", show_default=False)] = False
    tolerance: float = TOLERANCE
    json_file: Annotated[Path | None, Parameter(name="--json")] = None

    @property
    def destination(self) -> Destination:
        """The one that was given. Raises ConvpareError where it is none or more."""
        known = {"onnx": self.onnx, "pt2": self.pt2, "torch": self.torch}
        given = [Destination(kind, path, self.int8) for kind, path in known.items() if path is not None]
        if len(given) != 1:
            raise ConvpareError("what shall be written? Give one of --onnx F.onnx, --pt2 F.pt2 and --torch FOLDER")
        return given[0]

    def check(self, data: str | None) -> None:
        """Refuse what does not go together, and find out before long work whether the files can be written."""
        destination = self.destination
        if self.int8 and data is None:
            raise ConvpareError("--int8 takes the ranges of activations from images: give --data")
        check_destination(destination)
        check_json(self.json_file, destination.path if destination.kind == "torch" else None)
        written = {path.absolute() for path in (destination.path, destination.int8_path)}
        if self.json_file is not None and self.json_file.absolute() in written:
            raise ConvpareError(f"--json is {self.json_file}, which is what --{destination.kind} writes; take another")


@Parameter(name="*", group=RESULT)
@dataclass(frozen=True)
class InspectionArguments:
    """Where an inspection goes.

    Attributes:
        json_file: write everything that was found to this file, as JSON
        report: write a page that explains what was found to this .html file
        gallery: with --data: a folder for pictures of each group's most similar feature maps
    """

    json_file: Annotated[Path | None, Parameter(name="--json")] = None
    report: Path | None = None
    gallery: Path | None = None

    def check(self, data: str | None) -> None:
        """Find out before long work whether all can be written."""
        check_json(self.json_file)
        check_report(self.report)
        check_gallery(self.gallery, data)


@Parameter(name="*", group=RESULT)
@dataclass(frozen=True)
class ReportArguments:
    """What a report shows beside what the artifact holds, and where it goes.

    Attributes:
        output: the file; default: the artifact's name with .html behind, beside it
        sweep: the trade-off, a file that `convpare plan --sweep --json` wrote
        json_file: write what the page says to this file, as JSON
    """

    output: Annotated[Path | None, Parameter(name=["--output", "-o"])] = None
    sweep: Path | None = None
    json_file: Annotated[Path | None, Parameter(name="--json")] = None

    def check(self, artifact: str) -> Path:
        """Find out before long work whether both can be written; the page's file."""
        beside = Path(artifact).resolve()
        output = self.output or beside.with_name(f"{beside.name}.html")
        check_report(output, "--output")
        check_json(self.json_file)
        return output


@Parameter(name="*", group=METHOD)
@dataclass(frozen=True)
class MethodArguments:
    """How channels are chosen.

    Attributes:
        methods: prune (remove channels), factorize (replace layers by chains of two), or prune,factorize: whatever adds
            the least error; with factorize the criterion is reconstruction or sensitivity
        scope: inner: residual streams keep their width; auto: inner if the budget allows it, else all
        allocation: how a budget is spread over the groups; default: what suits the criterion
        round_to: layers keep multiples of this many channels
        exclude: groups that stay whole, or layers that become no chain, with commas between;
            `convpare inspect` shows their names
        inexact: take marked groups, too, whose removal by nature changes the others
        merge: first let layers take in the expansions before them where nothing nonlinear stands between
        images: calibration images that the criterion looks at
        rounds: remove in so many steps, looking again before each
        seed: of the choice of images
    """

    criterion: Annotated[str, Parameter(help=", ".join(criteria()))] = "qsfm-ssim"
    methods: str = "prune"
    scope: Literal["auto", "inner", "all"] = "auto"
    allocation: Literal["uniform", "global"] | None = None
    round_to: Count = 1
    exclude: Annotated[tuple[str, ...], Parameter(negative="", show_default=False)] = ()
    inexact: Annotated[bool, Parameter(negative="", show_default=False)] = False
    merge: Annotated[bool, Parameter(negative="", show_default=False)] = False
    form: FormArgument = "module"
    images: Count = 256
    rounds: Count = 1
    seed: Annotated[int, Parameter(validator=Number(gte=0, lt=2**63))] = 0

    def options(self, budget: BudgetArguments, criterion_options: dict[str, Any]) -> PlanOptions:
        get_criterion(self.criterion)
        exclude = tuple(name.strip() for text in self.exclude for name in text.split(",") if name.strip())
        return PlanOptions(
            methods=tuple(name.strip() for name in self.methods.split(",") if name.strip()),
            scope=self.scope, allocation=self.allocation, round_to=self.round_to, exclude=exclude,
            inexact=self.inexact, merge=self.merge, images=self.images, rounds=self.rounds, threshold=budget.threshold,
            seed=self.seed, latency=budget.latency, memory=budget.memory, target=budget.target,
            criterion_options=criterion_options,
        )  # fmt: skip


@Parameter(name="*", group=QSFM)
@dataclass(frozen=True)
class QSFMArguments:
    """The open choices of QSFM.

    Attributes:
        tap: activation (default): the maps that the next layer reads; conv: those that the convolution gives
        window: SSIM over whole maps (global, default) or in gaussian windows
        data_range: dynamic range of the maps: of the whole layer (default), of each image, or a number
        rule: drop one of the most similar pair, again and again (default); or rank by mean or maximal similarity
        who: of a pair goes the one more similar to the total rest (default), or the one of smaller norm
    """

    tap: Literal["activation", "conv"] | None = None
    window: Literal["global", "gaussian"] | None = None
    data_range: str | None = None
    rule: Literal["pair", "mean", "max"] | None = None
    who: Literal["total", "norm"] | None = None

    def options(self, criterion: str) -> dict[str, Any]:
        """What the criterion is given: only what was said."""
        given: dict[str, Any] = {name: value for name, value in vars(self).items() if value is not None}
        if given and not get_criterion(criterion).name.startswith("qsfm"):
            raise ConvpareError(
                f"{option(next(iter(given)))} is an option of qsfm-ssim and qsfm-psnr; criterion {criterion} has none "
                "such. Leave it out, or choose one of the two with --criterion."
            )
        if self.who == "norm" and self.rule in ("mean", "max"):
            raise ConvpareError(
                f"--who norm chooses within pairs; with --rule {self.rule} there are none, leave it out"
            )
        if self.data_range not in (None, "layer", "image"):
            given["data_range"] = _positive(str(self.data_range))
        return given


@Parameter(name="*", group=RECOVERY)
@dataclass(frozen=True)
class RecoveryArguments:
    """How accuracy is won back.

    Attributes:
        recover: calibrate: least squares or batch norm, whichever serves, without gradients; distill: then training on
            what the original puts out, without labels; finetune: with labels, too
        recover_images: calibration images of the recovery
        samples: image positions per unknown that least squares looks at; more is better and slower
        epochs: of training: passes over the images; default: 5
        minutes: of training, in place of --epochs
        train_images: of training; default: all training images
        lr: of training: the highest learning rate
        batch_size: of training
        features: of training: what the outputs of blocks count beside those of the network; default: 3
    """

    recover: Literal["calibrate", "least-squares", "batch-norm", "distill", "finetune", "none"] = "calibrate"
    recover_images: Count = 1024
    samples: Count = 64
    epochs: CountOrNone = None
    minutes: float | None = None
    train_images: CountOrNone = None
    lr: float | None = None
    batch_size: CountOrNone = None
    features: float | None = None

    def options(self, seed: int) -> RecoverOptions | None:
        of_training = ("epochs", "minutes", "train_images", "lr", "batch_size", "features")
        given = [n for n in of_training if getattr(self, n) is not None]
        if given and self.recover not in TUNINGS:
            raise ConvpareError(f"{option(given[0])} is about training: give it with --recover distill or finetune")
        if several() and self.recover not in TUNINGS:
            raise ConvpareError(
                "several processes were launched, and they share training alone: give --recover distill or finetune, "
                "or start this without accelerate launch or torchrun"
            )
        if self.recover == "none":
            return None
        features = FEATURES if self.features is None else self.features
        tune = TuneOptions(self.epochs, self.minutes, self.train_images, self.lr, self.batch_size, features)
        return RecoverOptions(self.recover, self.recover_images, seed, LeastSquares(samples=self.samples), tune)

    def checkpoint(self, output: Path) -> Path | None:
        """Where the state of training is stored until it is over: beside the artifact."""
        return output.with_name(f"{output.name}.training") if self.recover in TUNINGS else None


@Parameter(name="*", group=RECOVERY)
@dataclass(frozen=True)
class TrainingArguments(RecoveryArguments):
    """The same, with training where nothing else is said."""

    recover: Literal["calibrate", "least-squares", "batch-norm", "distill", "finetune", "none"] = "distill"


@Parameter(name="*", group=TRUNCATION)
@dataclass(frozen=True)
class TruncationArguments:
    """What is truncated.

    Attributes:
        forms: cuts such as o|ihw,oi|hw or formats such as tucker, tt:oihw, cp, with commas between; default: all cuts
        fractions: what is kept of the full rank, with commas between
        layers: names of convolutions, with commas between; default: all
        only: each: every layer alone; joint: all layers at once; default: both
        images: labelled images that accuracy is measured on, a fixed random choice
        retrain: fractions at which the network with all layers truncated is trained again
        retrain_as: dense: the truncated kernels; factors: chains of layers; default: both
        retrain_images: labelled training images of that; default: all
        epochs: of training again
        lr: learning rate of training again
        seed: of training again
        store: a file of JSON lines that every point goes to as it comes; a second run goes on with it
    """

    forms: str | None = None
    fractions: str = ",".join(f"{f:g}" for f in FRACTIONS)
    layers: str | None = None
    only: Literal["each", "joint"] | None = None
    images: Count = 1000
    retrain: str | None = None
    retrain_as: Literal["dense", "factors"] | None = None
    retrain_images: CountOrNone = None
    epochs: Count = 3
    lr: float = 0.01
    seed: Annotated[int, Parameter(validator=Number(gte=0, lt=2**63))] = 0
    store: Path | None = None

    def options(self) -> TruncateOptions:
        return TruncateOptions(
            forms=_names(self.forms),
            fractions=tuple(numbers(self.fractions, "--fractions") or ()),
            layers=_names(self.layers),
            each=self.only != "joint",
            joint=self.only != "each",
            images=self.images,
            retrain=tuple(numbers(self.retrain, "--retrain") or ()),
            retrain_as=("dense", "factors") if self.retrain_as is None else (self.retrain_as,),
            retrain_images=self.retrain_images,
            training=TrainOptions(epochs=self.epochs, lr=self.lr, schedule="cosine", seed=self.seed),
        )


@Parameter(name="*", group=TIMING)
@dataclass(frozen=True)
class TimingArguments:
    """What is measured.

    Attributes:
        runtimes: eager, compile (torch.compile) and onnxruntime, with commas between
        batches: numbers of images in a batch, with commas between
        threads: numbers of threads, with commas between; default: what torch takes
        seconds: for each setting, all networks together
    """

    runtimes: str = "eager"
    batches: str = "1"
    threads: str | None = None
    seconds: float = 5.0

    def options(self) -> BenchOptions:
        return BenchOptions(
            _names(self.runtimes) or (), _counts(self.batches, "--batches"),
            None if self.threads is None else _counts(self.threads, "--threads"), self.seconds,
        )  # fmt: skip


def _counts(text: str, option: str) -> tuple[int, ...]:
    parts = _names(text) or ()
    if not parts or not all(part.isdecimal() and part.isascii() and 0 < int(part) < 2**31 for part in parts):
        raise ConvpareError(f"{option} is {text!r}; expected whole numbers above 0 with commas between, such as 1,64")
    return tuple(int(part) for part in parts)


def _names(text: str | None) -> tuple[str, ...] | None:
    return None if text is None else tuple(name.strip() for name in text.split(",") if name.strip())


def option(name: str) -> str:
    return "--" + name.replace("_", "-")


def numbers(text: str | None, option: str) -> list[float] | None:
    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise ConvpareError(
            f"{option} is {text!r}; expected numbers with commas between, such as 0.5,0.5,0.5"
        ) from error


def _positive(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise ConvpareError(f"--data-range is {text!r}; expected layer, image, or a number above 0")
    return number
