"""Verifying final answers to problems of mathematics: exact, and safe on hostile text.

In the order of use: `extraction`, `normalise`, `numerals`, `shapes`, `comparison`, then `caps` and
`algebra` for what only computer algebra can decide. `posttrain.rewards.math` puts them together.
"""
