"""Figures for people, as files of HTML that open without a network. The only room that knows HTML."""

from convpare.report.figures import DOCTYPE, theory_figure, trade_off_figure, truncation_figure, write_figure

__all__ = ["DOCTYPE", "theory_figure", "trade_off_figure", "truncation_figure", "write_figure"]
