"""From the full model to a stage's submodel, and back. Pure functions; knows neither trainer nor files.

A rule of one's own is a function and a line: `GROUPINGS["mine"] = my_rule`, likewise for `FUSIONS` and `TRANSFERS`.
"""

from hf_devft.stages.fusion import FUSIONS
from hf_devft.stages.grouping import GROUPINGS
from hf_devft.stages.transfer import TRANSFERS


__all__ = ["FUSIONS", "GROUPINGS", "TRANSFERS"]
