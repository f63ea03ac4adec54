"""What services share: life cycle, session, credit, configuration, logs, child processes."""
