"""Training: the loop, the optimizer's groups, the learning-rate schedule."""
