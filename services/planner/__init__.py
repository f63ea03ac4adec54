"""Turns an objective into a TaskIR; never executes anything."""
