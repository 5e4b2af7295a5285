"""Jinja templates of the batch script."""
