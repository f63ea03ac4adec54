"""Wraps one llama.cpp server: one credit per slot, streamed answers, cancellation that frees the slot."""
