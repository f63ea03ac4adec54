"""Remembers decisions, outcomes and episodes; the SQLite log is the truth, indexes are projections."""
