"""The demo of a cluster that loses a leaf. `python -m benchmarks.demo_sharded --help`."""
