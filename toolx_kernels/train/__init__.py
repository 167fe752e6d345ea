"""Training: the loop, what it samples and learns from, and how a run is kept and reported."""
