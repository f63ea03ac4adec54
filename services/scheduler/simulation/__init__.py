"""Virtual time: the real hub machine among simulated processes, without sockets, journal files or sleep.

Used by the tests, by `tierline simulate`, `tierline plan` and `tierline bench makespan`. Whatever is decided here is
decided by `services.scheduler.machine`; this package only moves the clock and the messages, and plays the peers.
"""
