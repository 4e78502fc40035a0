"""The benchmark harness: this package's operators against their rivals, interleaved, with the floors beside them."""
