"""Benchmarks: `python -m bench NAME --json` runs one and prints one JSON object; `python -m bench` lists them.

Each benchmark says what it measures and why that is fair in the docstring of its module. `limit` is what the libraries
alone would reach on these cores; what the product reaches is always shown beside it, measured in the same run.
"""
