"""Pages, plots and tables of finished and of running runs; no training step imports them."""

from asp_dist.report.comparison import print_comparison
from asp_dist.report.results_table import print_results
from asp_dist.report.run_report import try_report, write_report

__all__ = ["print_comparison", "print_results", "try_report", "write_report"]
