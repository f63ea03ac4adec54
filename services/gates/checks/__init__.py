"""Check programs that run inside the sandbox. They import nothing of Tierline, since nothing of it is there."""
