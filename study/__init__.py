"""What is run, where, and what is remembered: study files, the ledger, scheduling, training and tracking."""
