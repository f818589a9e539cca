"""Interventions in files: JSON and safetensors."""
