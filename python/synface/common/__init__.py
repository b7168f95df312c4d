"""What every package may use: checks, files, random numbers. It imports nothing of ours."""
