"""Runs deterministic checks on artefacts in a sandbox; knows no tasks."""
