"""Intervals, contrasts and rankings over seeds: pure functions, arrays in, arrays out."""
