"""The hub of the bus and the only owner of task state."""
