"""The planner: a task goes in, the same task with steps, gates, personas and reasons comes out. See README.md."""
