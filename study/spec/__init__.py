"""The study file: its content, and what follows from it."""
