"""Masked reconstruction losses, with and without SimMIM's linear head."""
