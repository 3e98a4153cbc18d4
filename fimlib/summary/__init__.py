"""All of it in one table: how wrong, which estimator, how many samples."""

from fimlib.summary.findings import LayerSummary
from fimlib.summary.measure import Summary, summarise

__all__ = ["LayerSummary", "Summary", "summarise"]
