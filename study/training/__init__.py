"""Training of one unit: only PyTorch, no Ray, no MLflow."""
