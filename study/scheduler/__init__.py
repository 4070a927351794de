"""From the ledger to workers and back: units, the queue that issues them, and the executors that run them."""
