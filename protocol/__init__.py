"""The wire contract of Tierline: what travels on the bus, and how a program speaks to it.

This package imports nothing of `services`. `protocol/README.md` is the authority for other languages; where the
text and this code disagree, the golden bytes under `tests/contract` decide.
"""
