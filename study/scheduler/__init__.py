"""Scheduling: the queue that issues units from the ledger, and the executors that run them."""
