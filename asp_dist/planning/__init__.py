"""What a run will prune and cost, and whether its recipe works, before it is started."""

from asp_dist.planning.estimate import Estimate, estimate_run
from asp_dist.planning.plan_text import print_plan
from asp_dist.planning.rehearsal import Rehearsal, rehearse

__all__ = ["Estimate", "Rehearsal", "estimate_run", "print_plan", "rehearse"]
