"""What several processes that train together need: engines, weights in shards, states, and what they agree on."""
