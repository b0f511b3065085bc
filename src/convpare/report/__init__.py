"""Results for people, as files of HTML that open without a network. The only room that knows HTML, but for
the small tables in notebooks (`convpare.notebook`).

A report is gathered as plain data (`gather`, `network`, `pictures`), laid out (`drawing`) and written (`page`).
"""

from convpare.report.figures import DOCTYPE, theory_figure, trade_off_figure, truncation_figure, write_figure
from convpare.report.gather import Facts, Report, report_of_artifact, report_of_inspection, report_of_truncation
from convpare.report.network import Network, network_of
from convpare.report.page import render, write_report
from convpare.report.pictures import Pair, gallery

__all__ = [
    "DOCTYPE", "Facts", "Network", "Pair", "Report", "gallery", "network_of", "render", "report_of_artifact",
    "report_of_inspection", "report_of_truncation", "theory_figure", "trade_off_figure", "truncation_figure",
    "write_figure", "write_report",
]  # fmt: skip
