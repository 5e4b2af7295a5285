"""Decoding: how answers are sampled, and whether they are the policy's own."""
