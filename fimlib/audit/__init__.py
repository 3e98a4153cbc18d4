"""Which formula a diagonal follows that other code computed."""

from fimlib.audit.formulas import Formula
from fimlib.audit.judge import Identified, identify

__all__ = ["Formula", "Identified", "identify"]
