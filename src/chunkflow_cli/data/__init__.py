"""Rows to samples, samples to tokens and targets, and the cache that keeps them."""
