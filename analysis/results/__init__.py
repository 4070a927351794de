"""Results of a study: summary, comparisons, uncertainty and importance."""
