"""The mask token in place of hidden patches."""
