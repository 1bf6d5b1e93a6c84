"""2x2 tokens into one."""
