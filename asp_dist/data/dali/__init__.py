"""Loading with DALI pipelines, on GPUs and CPUs."""
