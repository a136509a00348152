"""One measured batch size, in this process or in a worker."""
