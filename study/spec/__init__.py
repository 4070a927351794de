"""A study file: what it says, and what follows from it."""
