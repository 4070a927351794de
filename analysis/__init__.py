"""What the runs of a study say: typed frames, intervals, the frontier, figures, tables and the report."""
