"""Training on a Ray cluster; the only part of the project that imports ray."""

from asp_dist.cluster.driver import run
from asp_dist.cluster.failures import ClusterError

__all__ = ["ClusterError", "run"]
