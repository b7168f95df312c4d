"""Checks, files and random numbers for every package; imports no other package of synface."""
