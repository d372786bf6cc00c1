"""The learning core: PyTorch alone."""
