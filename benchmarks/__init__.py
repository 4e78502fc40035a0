"""Benchmarks on the shapes of published models. See README.md beside this file."""
