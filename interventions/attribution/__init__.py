"""First-order effects of every place and every edge from few backward passes, heads as rows, and circuits."""
