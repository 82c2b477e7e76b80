"""A stock Flower App that times its own messages."""
