"""`asp-dist plan`: what a run will prune, cost and take, before it is started."""

from asp_dist.planning.estimate import Estimate, estimate_run
from asp_dist.planning.plan_text import print_plan

__all__ = ["Estimate", "estimate_run", "print_plan"]
