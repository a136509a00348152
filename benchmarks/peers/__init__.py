"""Every finder of a batch size on the same work, in one run: ``python -m benchmarks.peers``."""
