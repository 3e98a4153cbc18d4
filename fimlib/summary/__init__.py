"""All of it in one table: how wrong, which estimator, how many samples."""

from fimlib.summary.measure import LayerSummary, Summary, summarise

__all__ = ["LayerSummary", "Summary", "summarise"]
