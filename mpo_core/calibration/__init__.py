"""Calibration: texts through a model, and the statistics of its layers."""
