"""Figures of the experiments."""

import math
import os
import secrets
from pathlib import Path
from typing import Any

from convpare.errors import ConvpareError
from convpare.optional import import_extra
from convpare.prospect import TradeOff
from convpare.theory import Theory
from convpare.truncate import ALL, Truncation

DOCTYPE = "<!doctype html>"  # how every page begins
COLUMNS = 3
_SCALE = "Viridis"
_SHADES = ("#3b528b", "#21918c", "#e07b39", "#a23b72", "#5ec962")


def truncation_figure(found: Truncation) -> Any:
    """Accuracy against norm loss, a panel for each cut, layers coloured by their depth; all layers at once as a line.

    Raises:
        ConvpareError: plotly is missing.
    """
    forms = list(dict.fromkeys(p.form for p in found.points))
    figure = _panels(forms, COLUMNS)
    for number, form in enumerate(forms):
        place = {"row": 1 + number // COLUMNS, "col": 1 + number % COLUMNS}
        points = [p for p in found.points if p.form == form]
        single = [p for p in points if p.layer != ALL]
        joint = sorted((p for p in points if p.layer == ALL), key=lambda p: p.norm_loss)
        figure.add_scatter(
            x=[100 * p.norm_loss for p in single], y=[p.top1 for p in single], mode="markers", showlegend=False,
            marker={"color": [p.depth for p in single], "coloraxis": "coloraxis", "size": 6, "opacity": 0.85},
            customdata=[(p.layer, p.fraction, 100 * p.relative_error, "×".join(map(str, p.ranks))) for p in single],
            hovertemplate="%{customdata[0]}<br>rank %{customdata[3]}<br>norm loss %{x:.1f} %, relative error "
            "%{customdata[2]:.1f} %<br>top-1 %{y:.2f} %<extra></extra>",
            **place,
        )  # fmt: skip
        figure.add_scatter(
            x=[0, *(100 * p.norm_loss for p in joint)], y=[found.base, *(p.top1 for p in joint)], name=ALL,
            mode="lines+markers", line={"color": "#888", "width": 1.5}, marker={"symbol": "diamond", "size": 7},
            showlegend=number == 0, legendgroup=ALL, visible=True if joint else "legendonly",
            hovertemplate="all layers<br>mean norm loss %{x:.1f} %<br>top-1 %{y:.2f} %<extra></extra>", **place,
        )  # fmt: skip
    figure.update_xaxes(title_text="norm loss 1 − ‖T_χ‖/‖T‖, %", rangemode="tozero", matches="x")
    figure.update_yaxes(title_text="top-1, %", rangemode="tozero")
    figure.update_layout(
        title=f"{found.model}: accuracy after truncation, without training ({found.images:,} images)",
        coloraxis={"colorscale": _SCALE, "colorbar": {"title": "depth"}, "cmin": 0, "cmax": 1},
    )
    return figure


def theory_figure(found: Theory) -> Any:
    """Estimation error against √(d_M/n), a panel for each model and kind of inputs, a colour for each K.

    Raises:
        ConvpareError: plotly is missing.
    """
    panels = list(dict.fromkeys((fit.kind, fit.inputs) for fit in found.fits))
    rows = list(dict.fromkeys(inputs for _, inputs in panels))
    kinds = list(dict.fromkeys(kind for kind, _ in panels))
    names = {"cnn": "CNN", "tucker": "Tucker", "cp": "CP"}
    figure = _panels([f"{names[kind]}, {inputs} inputs" for inputs in rows for kind in kinds], len(kinds))
    colours = {k: _SHADES[n % len(_SHADES)] for n, k in enumerate(found.options.K)}
    for fit in found.fits:
        place = {"row": 1 + rows.index(fit.inputs), "col": 1 + kinds.index(fit.kind)}
        points = [p for p in found.points if (p.kind, p.inputs, p.K) == (fit.kind, fit.inputs, fit.K)]
        ends = [0, max(p.t for p in points)]
        shared = {"name": f"K = {fit.K}", "legendgroup": f"K{fit.K}", **place}
        figure.add_scatter(
            x=[p.t for p in points], y=[p.error for p in points], mode="markers", showlegend=False,
            marker={"color": colours[fit.K], "size": 5, "opacity": 0.6},
            hovertemplate="√(d_M/n) = %{x:.3f}<br>error %{y:.4f}<extra></extra>", **shared,
        )  # fmt: skip
        figure.add_scatter(
            x=ends, y=[fit.line.intercept.value + fit.line.slope.value * x for x in ends], mode="lines",
            line={"color": colours[fit.K], "width": 1.5}, showlegend=place == {"row": 1, "col": 1}, hoverinfo="skip",
            **shared,
        )  # fmt: skip
    figure.update_xaxes(title_text="√(d_M/n)", rangemode="tozero")
    figure.update_yaxes(title_text="‖Ŵ − W*‖", rangemode="tozero")
    figure.update_layout(title="Estimation error against sample complexity, with lines through the straight part")
    return figure


def trade_off_figure(found: TradeOff) -> Any:
    """Predicted error against what is left of the MACs and parameters, a point for each plan.

    Raises:
        ConvpareError: plotly is missing.
    """
    figure = _panels([f"{found.model}, criterion {found.criterion}"], 1)
    for (metric, name), colour in zip((("macs", "MACs"), ("params", "parameters")), _SHADES, strict=False):
        figure.add_scatter(
            x=[100.0, *(100 * plan.achieved[metric] for plan in found.plans)],
            y=[0.0, *(plan.error for plan in found.plans)], name=name, mode="lines+markers", line={"color": colour},
            hovertemplate=f"{name} %{{x:.1f}} %<br>predicted error %{{y:.3g}}<extra></extra>",
        )  # fmt: skip
    figure.update_xaxes(title_text="left, %", rangemode="tozero")
    figure.update_yaxes(title_text="predicted error", rangemode="tozero")
    figure.update_layout(title="What the budget costs", height=520)
    return figure


def write_figure(figure: Any, path: str | Path) -> None:
    """Write a figure as one HTML file with all that it needs, whole or not at all.

    Raises:
        ConvpareError: the file cannot be written.
    """
    place = Path(path)
    temporary = place.with_name(f".convpare-{secrets.token_hex(4)}.html")
    page = figure.to_html(include_plotlyjs=True, full_html=True, config={"displaylogo": False})
    try:
        temporary.write_text(page if page.startswith(DOCTYPE) else f"{DOCTYPE}\n{page}")
        os.replace(temporary, place)
    except OSError as error:
        raise ConvpareError(f"{path} cannot be written: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def _panels(titles: list[str], columns: int) -> Any:
    subplots = import_extra("plotly.subplots", "report")
    rows = math.ceil(len(titles) / columns)
    gap = min(0.35 / max(rows, 1), 0.16)
    figure = subplots.make_subplots(
        rows=rows, cols=columns, subplot_titles=titles, horizontal_spacing=0.07, vertical_spacing=gap
    )
    figure.update_layout(
        template="plotly_white", showlegend=True, height=90 + 330 * rows, width=1180,
        margin={"t": 90, "r": 30, "b": 60, "l": 70},
        legend={"orientation": "h", "y": 0.97, "yanchor": "top", "x": 0.84, "xanchor": "right", "yref": "container"},
    )  # fmt: skip
    return figure
