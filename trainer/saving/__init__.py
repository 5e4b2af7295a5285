"""Saving: folders that anything else can load."""
