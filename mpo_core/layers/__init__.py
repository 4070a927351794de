"""Structured linear layers: one interface, one file for each kind."""
