"""Saving and loading of interventions: files of JSON and safetensors."""
