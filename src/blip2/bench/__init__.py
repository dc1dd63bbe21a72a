"""What a model costs on this machine, and how far that is from what the machine could do: measured, with its limits."""
