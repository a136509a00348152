"""What a training loop does with a plan: rates, ramps, accumulation, loaders, and what bigger batches are worth."""
