"""Fits of structured layers to a weight and to its inputs."""
