"""The main job in one call: plan, apply, check, recover, and what it cost."""

import reprlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from convpare.apply import FailedCheck, carry_out, plan_of
from convpare.data import Data, ImageSet
from convpare.errors import ConvpareError, Infeasible
from convpare.evaluation import Evaluation, evaluate
from convpare.graph.capture import Inputs
from convpare.graph.check import SelfCheck
from convpare.graph.structure import Form
from convpare.jsonable import finite
from convpare.notebook import html_table
from convpare.planning.cost import Cost
from convpare.planning.latency import timed_beside
from convpare.planning.layer_times import Target
from convpare.planning.plan import Plan
from convpare.planning.planner import Planner
from convpare.planning.settings import PlanOptions
from convpare.planning.solver import Budget
from convpare.prospect import TradeOff, trade_off
from convpare.recovery import TUNINGS, Recovered, RecoverOptions, recover_with, tuned
from convpare.recovery.processes import current

_TARGETS = [{"runtime": str, "batch": int, "threads": threads} for threads in (int, type(None))]
ATTEMPTS = 5  # plans that are measured against a budget of latency

Progress = Callable[[str, int, int], None]
"""Called with (what is being done, how much is done, of how much)."""


@dataclass(frozen=True)
class Stage:
    """The network after a step: its accuracy, if test images have labels, and how long the step took."""

    name: str
    top1: float | None
    seconds: float

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "top1": self.top1, "seconds": round(self.seconds, 3)}


@dataclass(frozen=True, eq=False)
class Compression:
    """A compressed network and everything that was measured on the way.

    Attributes:
        model: the result; a new module of the given one's class, or in the graph form one of its own.
        plan: what was removed, for which budget.
        check: zeroed == removed.
        stages: accuracy at the start, after surgery and after recovery.
        recovered: how accuracy was won back; None where recovery was not asked for.
        excluded: groups that failed the self-check, and were left whole.
        test_images: how many images the accuracies are of.
        tried: where several methods were tried together and each alone, the relative output error of each, after
            recovery, on images kept aside; the best one was taken.
        latency: milliseconds before and after on the target of the plan, where there was a budget of them.
        sweep: what other budgets would cost, if that was asked for.
    """

    model: nn.Module
    plan: Plan
    check: SelfCheck
    stages: tuple[Stage, ...]
    recovered: Recovered | None
    excluded: tuple[str, ...]
    test_images: int
    tried: Mapping[str, float] = field(default_factory=dict)
    latency: tuple[float, ...] = ()
    sweep: TradeOff | None = None

    def _repr_html_(self) -> str:
        """As a notebook shows it."""
        swept = "" if self.sweep is None else self.sweep._repr_html_()
        return html_stages(self.stages) + self.plan._repr_html_() + swept + self.check._repr_html_()

    def to_json(self) -> dict[str, Any]:
        first, last = self.stages[0].top1, self.stages[-1].top1
        return {
            "model": self.plan.model,
            "form": self.plan.form,
            "criterion": self.plan.criterion,
            "options": dict(self.plan.options),
            "requested": dict(self.plan.requested),
            "achieved": self.plan.achieved,
            "before": _side(self.plan.before, first),
            "after": _side(self.plan.after, last),
            "stages": [stage.to_json() for stage in self.stages],
            "self_check": self.check.to_json(),
            "recovery": recovery_json(self.recovered),
            "excluded": list(self.excluded),
            "tried": finite(dict(self.tried)),
            "test_images": self.test_images,
            "latency": None if not self.latency else {**self.plan.options["target"], "ms": list(self.latency)},
            "sweep": None if self.sweep is None else self.sweep.to_json(plans=False),
        }


@dataclass(frozen=True)
class CompressOptions:
    """Options of the steps.

    Attributes:
        plan: of the plan.
        recover: of recovery; None: none.
        test_limit: how many test images to show; None: all.
        form: "module", "graph" or "linked", see `trace`.
        checkpoint: where the state of training is stored (see `tune`); training goes on there.
        sweep: how many other plans to make on the way to the budget, for the trade-off; none by a threshold or in
            rounds.
    """

    plan: PlanOptions = field(default_factory=PlanOptions)
    recover: RecoverOptions | None = field(default_factory=RecoverOptions)
    test_limit: int | None = None
    form: Form = "module"
    checkpoint: Path | None = None
    sweep: int = 0


def compress(
    model: nn.Module,
    example_inputs: Inputs,
    data: Data | ImageSet | Tensor | None = None,
    *,
    macs: float | None = None,
    params: float | None = None,
    criterion: str = "qsfm-ssim",
    options: CompressOptions = CompressOptions(),
    on_progress: Progress | None = None,
) -> Compression:
    """Plan, apply, check and recover. The given model is untouched.

    Calibration uses training images of `data` without their labels; its test images serve for the accuracies alone.
    A group whose surgery fails the self-check is left whole, and the plan is made anew without it. Several methods are
    tried together and each alone, and what comes nearest to the original after recovery is taken. A budget of latency
    is met as measured: where a network is slower than predicted the plan is made anew with less. Of several processes
    that were launched the main one does all this, the others train with it.

    Raises:
        ConvpareError: as `plan`, `apply` and `recover`, or recovery is wanted without images; nothing has been changed.
    """
    recovery = _wanted(options, data)
    budget = options.plan.budget(macs, params)
    tell = on_progress or (lambda *_: None)

    def make() -> _Choice:
        started = time.perf_counter()
        tell("tracing", 0, 1)
        planner = Planner(model, example_inputs, data, criterion=criterion, options=options.plan, form=options.form)
        traced = time.perf_counter() - started
        tries: list[_Try] = []
        for methods in _candidates(options.plan.methods, recovery is not None):
            try:
                found = _carried_out(model, planner, budget, methods, tell)
            except Infeasible:
                if methods == options.plan.methods:
                    raise
                continue
            tries.append(_recovered(found, model, data, recovery, tell))
        errors = {" and ".join(t.methods): t.error for t in tries} if len(tries) > 1 else {}
        best = min(tries, key=lambda t: t.error)
        return _Choice(best, errors, traced, _swept(planner, budget, best, options, tell))

    choice = _in_all(model, make)
    choice = replace(choice, best=_trained(choice.best, model, data, options, tell))
    return _measured(model, choice, data, options.test_limit, tell)


def carry_through(
    model: nn.Module,
    plan: Plan,
    data: Data | ImageSet | Tensor | None = None,
    *,
    options: CompressOptions = CompressOptions(),
    on_progress: Progress | None = None,
) -> Compression:
    """As `compress`, by a plan that is there. The given model is untouched. A budget of latency is measured, not met.

    Args:
        options: of recovery and of the test images; the plan has its own form.

    Raises:
        FailedCheck: the smaller network is not the same function; nothing has been changed.
        ConvpareError: the plan was made for another network, or recovery is wanted without images.
    """
    recovery = _wanted(options, data)
    tell = on_progress or (lambda *_: None)
    started = time.perf_counter()
    target = _target_of(plan) if "latency" in plan.requested else None
    tell("surgery and self-check", 0, 1)
    small, check = carry_out(model, plan, data)
    assert check is not None
    made = plan_of(small)  # with its cost made true
    assert made is not None
    found = _Try((), made, small, check, (), (time.perf_counter() - started, 0.0))
    if target is not None:
        tell("measuring latency", 0, 1)
        timed = current().once(lambda: tuple(timed_beside([model, small], made.inputs, target)))
        found = replace(found, latency=timed)
    best = _trained(_recovered(found, model, data, recovery, tell), model, data, options, tell)
    return _measured(model, _Choice(best), data, options.test_limit, tell)


def _target_of(plan: Plan) -> Target:
    """Where a network is to run whose plan has a budget of latency."""
    found = plan.options.get("target")
    if not isinstance(found, dict) or {key: type(value) for key, value in found.items()} not in _TARGETS:
        raise ConvpareError(
            f"the plan has a budget of latency, but its target is {reprlib.repr(found)}; expected the name of a "
            "runtime, and numbers of batch and threads (null: as they are)"
        )
    return Target(**found)


def _wanted(options: CompressOptions, data: Data | ImageSet | Tensor | None) -> RecoverOptions | None:
    """The options of recovery, if there is to be any."""
    recovery = options.recover if options.recover is not None and options.recover.method != "none" else None
    if recovery is not None and data is None:
        raise ConvpareError("recovery needs images: give data, or CompressOptions(recover=None)")
    return recovery


def _candidates(methods: tuple[str, ...], measured: bool) -> list[tuple[str, ...]]:
    """What is tried: all methods together; where it can be measured what they give, each alone, too."""
    return [methods, *((method,) for method in methods)] if len(methods) > 1 and measured else [methods]


@dataclass(frozen=True, eq=False)
class _Try:
    """A plan that was carried out."""

    methods: tuple[str, ...]
    plan: Plan
    surgery: nn.Module
    check: SelfCheck
    excluded: tuple[str, ...]
    seconds: tuple[float, float]  # of planning and surgery, of recovery
    recovered: Recovered | None = None
    calibrated: nn.Module | None = None  # before it was trained, if it was
    latency: tuple[float, ...] = ()  # milliseconds before and after, where there is a budget of them

    def of(self, model: nn.Module) -> "_Try":
        """The same of another network."""
        recovered = None if self.recovered is None else replace(self.recovered, model=model)
        return replace(self, surgery=model, recovered=recovered)

    @property
    def slowness(self) -> float:
        """Measured time as a share of the original's."""
        return self.latency[1] / self.latency[0]

    @property
    def model(self) -> nn.Module:
        return self.surgery if self.recovered is None else self.recovered.model

    @property
    def error(self) -> float:
        """The relative error of the outputs on images that nothing was fitted to; 0 where nothing was recovered."""
        return 0.0 if self.recovered is None else self.recovered.errors[self.recovered.method]


@dataclass(frozen=True, eq=False)
class _Choice:
    """The best of what was tried, the error of each where they were several, and what was measured beside."""

    best: _Try
    errors: Mapping[str, float] = field(default_factory=dict)
    traced: float = 0.0  # seconds
    sweep: TradeOff | None = None


def _swept(planner: Planner, budget: Budget, best: _Try, options: CompressOptions, tell: Progress) -> TradeOff | None:
    """What other budgets would cost, planned as the best was."""
    if not options.sweep or options.plan.threshold is not None or options.plan.rounds > 1:
        return None
    return trade_off(planner, budget, options.sweep, tell, methods=best.methods, exclude=best.excluded)


def _carried_out(model: nn.Module, planner: Planner, budget: Budget, methods: tuple[str, ...], tell: Progress) -> _Try:
    """Plan, remove and check; what fails the check is left whole, what is too slow is planned with less time."""
    started = time.perf_counter()
    excluded: tuple[str, ...] = ()
    wanted, attempts = budget, 0
    while True:
        tell("planning", 0, 1)
        made = replace(planner.plan(wanted, methods=methods, exclude=excluded), requested=budget.fractions)
        tell("surgery and self-check", 0, 1)
        try:
            metrics = planner.statistics.metrics if made.factorizations else None
            small, check = carry_out(model, made, metrics=metrics, graph=planner.graph)
        except FailedCheck as failed:
            if not failed.groups:
                raise
            excluded = (*excluded, *failed.groups)
            continue
        assert check is not None
        found = _Try(methods, made, small, check, excluded, (0.0, 0.0))
        if budget.latency is not None:
            tell("measuring latency", 0, 1)
            found = replace(found, latency=tuple(timed_beside([model, small], made.inputs, planner.target)))
            attempts += 1
            if found.slowness > budget.latency:
                wanted = _tighter(wanted, budget.latency, found, attempts)
                continue
        return replace(found, seconds=(time.perf_counter() - started, 0.0))


def _tighter(tried: Budget, asked: float, found: _Try, attempts: int) -> Budget:
    """The next budget of predicted latency, where a network was slower than was asked for."""
    assert tried.latency is not None
    if attempts == ATTEMPTS:
        raise Infeasible(
            f"latency {asked:g} was asked for; {attempts} plans were measured, and the last takes {found.slowness:.3f} "
            "of the time of the network as it is; give a larger budget"
        )
    return replace(tried, latency=tried.latency * min(asked / found.slowness, 0.98))


def _recovered(
    found: _Try, model: nn.Module, data: Data | ImageSet | Tensor | None, options: RecoverOptions | None, tell: Progress
) -> _Try:
    if options is None or data is None:
        return found
    started = time.perf_counter()
    done = recover_with(
        found.surgery,
        model,
        data,
        options=options.calibration,
        on_progress=lambda done, total: tell("recovery", done, total),
    )
    return replace(found, recovered=done, seconds=(found.seconds[0], time.perf_counter() - started))


def _in_all(model: nn.Module, make: Callable[[], _Choice]) -> _Choice:
    """What the main process makes, in all processes: the others carry out its plan, and take its weights."""
    processes = current()
    if processes.count == 1:
        return make()
    made = []

    def told() -> _Choice:
        made.append(make())
        return replace(made[0], best=made[0].best.of(nn.Identity()))

    heard = processes.once(told)
    choice = made[0] if processes.main else replace(
        heard, best=heard.best.of(carry_out(model, heard.best.plan, check=False)[0])
    )  # fmt: skip
    processes.follow_(choice.best.model)
    return choice


def _trained(
    found: _Try, model: nn.Module, data: Data | ImageSet | Tensor | None, options: CompressOptions, tell: Progress
) -> _Try:
    """The same after training, if that was asked for."""
    if options.recover is None or options.recover.method not in TUNINGS or found.recovered is None or data is None:
        return found
    done = tuned(
        found.recovered, model, data, options.recover, checkpoint=options.checkpoint,
        on_progress=lambda done, total: tell("training", done, total),
    )  # fmt: skip
    return replace(found, recovered=done, calibrated=found.recovered.model)


def _measured(
    model: nn.Module, choice: _Choice, data: Data | ImageSet | Tensor | None, limit: int | None, tell: Progress
) -> Compression:
    """The result, with the accuracies of its stages."""
    tester, best = Tester(data, limit, tell), choice.best
    seconds = choice.traced + best.seconds[0]
    stages = [tester.stage("before", model, 0.0), tester.stage("surgery", best.surgery, seconds)]
    if best.recovered is not None:
        stages.append(tester.stage(best.recovered.method, best.calibrated or best.recovered.model, best.seconds[1]))
        if best.recovered.tuned is not None:
            stages.append(tester.stage("training", best.recovered.model, best.recovered.tuned.seconds))
    return Compression(
        best.model, best.plan, best.check, tuple(stages), best.recovered, best.excluded, tester.images, choice.errors,
        best.latency, choice.sweep,
    )  # fmt: skip


class Tester:
    """Shows the labelled test images, if there are any, to the network after each step."""

    def __init__(self, data: object, limit: int | None, tell: Progress) -> None:
        labelled = isinstance(data, Data) and data.test is not None and data.test.labelled
        self.test = data.test if isinstance(data, Data) and labelled else None
        self.limit, self.tell = limit, tell
        self.images = 0

    def stage(self, name: str, model: nn.Module, seconds: float) -> Stage:
        if self.test is None:
            return Stage(name, None, seconds)
        test = self.test
        found: Evaluation = current().once(
            lambda: evaluate(
                model, test, limit=self.limit,
                on_progress=lambda done, total: self.tell(f"accuracy {name}", done, total),
            )
        )  # fmt: skip
        self.images = found.images
        return Stage(name, found.top1, seconds)


def _side(cost: Cost, top1: float | None) -> dict[str, Any]:
    return {**cost.to_json(), "top1": top1}


def html_stages(stages: tuple[Stage, ...]) -> str:
    """The accuracies that are known, as a notebook shows them."""
    known = [(stage.name, f"{stage.top1:.2f}") for stage in stages if stage.top1 is not None]
    return html_table(("stage", "top-1 %"), known) if known else ""


def recovery_json(recovered: Recovered | None) -> dict[str, Any] | None:
    """How accuracy was won back, from what."""
    if recovered is None:
        return None
    fitted: Mapping[str, Any] = (
        {} if recovered.fitted is None
        else {"fitted": list(recovered.fitted.layers), "not_fitted": dict(recovered.fitted.kept)}
    )  # fmt: skip
    return {
        "method": recovered.method,
        "relative_output_errors": finite(dict(recovered.errors)),
        "images": recovered.images,
        "labels": recovered.tuned is not None and recovered.tuned.labelled,
        "gradient_passes": 0 if recovered.tuned is None else recovered.tuned.passes,
        **fitted,
        "training": None if recovered.tuned is None else recovered.tuned.to_json(),
    }
