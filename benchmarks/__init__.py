"""Benchmarks of the ops against their peers: `make bench`, and `make gpu-evidence` on a GPU."""
