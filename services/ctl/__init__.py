"""The `tierline` command: what operators type."""
