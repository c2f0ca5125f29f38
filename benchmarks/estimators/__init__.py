"""Gradient estimators where every expectation can be summed: bias, variance, and samples until the optimum is near."""
