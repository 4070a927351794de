"""The only writer of runs to MLflow: a projection of the ledger, which can be repeated and rebuilt."""
