"""Checks, files and random numbers for every package; it imports no other package of synface."""
