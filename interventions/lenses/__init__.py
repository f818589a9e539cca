"""Reading from the states of a model: logit lens, tuned lens, linear probes."""
