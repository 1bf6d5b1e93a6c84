"""What the ops share: how an op is made and chosen, rows, token layouts, matrix products, arrival counters."""
