"""Data-aware fitting of cores and other structures to a dense weight: the error that counts is that of its outputs."""
