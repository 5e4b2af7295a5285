"""Presets: one YAML file for each pair of models."""
