"""Tensor trains and trees: algebra on lists of tensors, their bonds, factorisations, inits and contraction."""
