"""Search with Optuna: samplers, the values reported to them, and early stopping of trials."""
