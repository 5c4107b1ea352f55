"""What becomes of people's files: a table on the screen, and a page with pictures."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tuner.hookspecs import hookimpl
from tuner.plugin import Plugin, PluginConfig

if TYPE_CHECKING:
    from tuner.data.order import Order
    from tuner.data.samples import Prepared
    from tuner.run import Run


class DataReportPlugin(Plugin[PluginConfig]):
    """Shows what of the data is used and why not the rest: on the screen and as `data_report.html`."""

    @hookimpl
    def data_ready(self, run: Run, data: Prepared, plan: Order) -> None:
        """Print the table and write the page, on the main process."""
        if not run.is_main:
            return
        from tuner.builtin.data_report.page import write_page
        from tuner.builtin.data_report.table import show_report

        show_report(data.report)
        write_page(run, data, plan)
