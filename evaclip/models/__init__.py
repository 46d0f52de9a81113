"""The towers; they know nothing of ranks, engines and precision."""
