"""SimMIM's locally normalised target."""
