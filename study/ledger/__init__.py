"""The ledger: the only source of truth about a study's trials and results."""
