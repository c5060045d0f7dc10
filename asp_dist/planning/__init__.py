"""What a run will prune and cost, and whether its recipe works, before it is started."""
