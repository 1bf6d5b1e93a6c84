"""``fastmim profile``: a few real steps under torch's profiler, with their memory and power."""
