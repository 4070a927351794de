"""Studies: study files, the ledger, scheduling, training and tracking."""
