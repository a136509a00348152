"""Small real workloads, loaded as ``example:NAME``."""
