"""The optimizer of a training: which one, its groups of parameters, its learning rate, and the updates of a step."""
