"""The results of a study's runs: typed frames, intervals, the frontier, figures, tables and the report."""
