"""Grids that carry Flower messages, and how tensors are packed into them."""
