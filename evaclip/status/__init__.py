"""How a run is, read off its directory by whoever may look at it, on a machine without torch."""
