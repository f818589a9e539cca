"""Causal models: variables, domains, mechanisms, counterfactual pairs."""
