"""Kept tokens back in their places, the mask token in the others."""
