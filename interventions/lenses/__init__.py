"""What the answer of a model would be after each of its blocks: logit lens, tuned lens, linear probes."""
