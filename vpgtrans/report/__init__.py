"""Pages and plots that say what a run or a comparison did, or what data holds: self-contained HTML, SVG and PNG.

`write_report` reads a run directory, `write_compare_report` a comparison's; both write `report.html` into it.
`write_card` writes the model card of a run's VLM.
`write_data_report` takes what was measured.
"""

from vpgtrans.report.card import write_card
from vpgtrans.report.compare import markdown_table, write_compare_report
from vpgtrans.report.data import write_data_report
from vpgtrans.report.page import write_report
from vpgtrans.report.plots import compare_plot

__all__ = ["compare_plot", "markdown_table", "write_card", "write_compare_report", "write_data_report", "write_report"]
