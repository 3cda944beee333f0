"""The demo: a daemon serves ranking requests over MovieLens. `python -m benchmarks.demo --help`."""
