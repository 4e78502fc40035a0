"""Benchmarks over the shapes of published models; see README.md beside this file."""
