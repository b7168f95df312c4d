"""What the ops cost beside their peers: `make bench`, and `make gpu-evidence` where a GPU is."""
