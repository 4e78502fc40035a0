"""The uses of a finished run: predict, evaluate its exits, prune it further, export it."""
