"""What a run will prune and cost, and whether its recipe works, before it is started."""

from asp_dist.planning.estimate import Estimate, OtherMachine, estimate_run
from asp_dist.planning.plan_text import print_plan
from asp_dist.planning.rehearsal import Rehearsal, rehearse
from asp_dist.planning.roofline import Shares, find_gpu

__all__ = ["Estimate", "OtherMachine", "Rehearsal", "Shares", "estimate_run", "find_gpu", "print_plan", "rehearse"]
