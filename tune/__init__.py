"""Sweeps over training settings with Ray Tune: search.py is the command, the other files are its parts."""
