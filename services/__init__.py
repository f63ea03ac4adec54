"""Independent processes around one bus; `services/README.md` has the table. They never import one another."""
