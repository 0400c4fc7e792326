"""Generating answers: Sampling, Completion, generators, and the loader that RL trains from."""
