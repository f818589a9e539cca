"""Which places correspond, where sources come from, at which tokens, and the swap itself."""
