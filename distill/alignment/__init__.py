"""Learning where, and in which directions, a network holds the variables of a causal model."""
