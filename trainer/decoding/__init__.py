"""Decoding: how answers are sampled."""
