"""What `tierline tune` is made of: what may be tried (`space`), in which order (`search`), how fast (`measure`)."""
