"""Side-by-side runs against baselines and peers: `python -m benchmarks NAME [--quick]`."""
