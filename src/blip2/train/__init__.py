"""Training: the objectives, the data, the loop and its recipes."""
