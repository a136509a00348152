"""What is run: batches of any size, the step, its state taken and put back."""
