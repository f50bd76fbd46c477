"""`python -m gpt2 report`: the page that compares runs."""

from experiments.report.command import add_arguments, run
from experiments.report.page import write_report

__all__ = ["add_arguments", "run", "write_report"]
