"""Training of one unit: PyTorch alone, neither Ray nor MLflow."""
