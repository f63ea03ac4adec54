"""The wrapper of one llama.cpp server per entry of registry/models.yaml: its life, its slots, its answers."""
