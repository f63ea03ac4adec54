"""The `tierline` command: starts and inspects a stack, runs tasks on it, explains what it did."""
