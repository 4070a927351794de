"""Tensor trains: algebra on lists of cores, their bonds, factorisations, inits and contraction."""
