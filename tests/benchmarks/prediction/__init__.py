"""How near predicted latencies come to measured ones, on architectures that the fit never saw."""
