"""Search with Optuna: samplers, the values they are told, and stopping trials early."""
