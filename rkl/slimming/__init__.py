"""Less compute for a network: pruning of channels, and early exit by confidence."""
