"""`asp-dist plan`: what a run will prune, cost and take, before it is started."""

from asp_dist.planning.plan import Plan, make_plan
from asp_dist.planning.text import print_plan

__all__ = ["Plan", "make_plan", "print_plan"]
