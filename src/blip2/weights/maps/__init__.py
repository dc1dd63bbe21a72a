"""What other formats call our tensors: tables only."""
