"""Measurements that `asp-dist bench` runs."""

from asp_dist.bench.overhead import bench_overhead, print_overhead

__all__ = ["bench_overhead", "print_overhead"]
