"""The report of a study: one folder of pages, figures and tables."""
