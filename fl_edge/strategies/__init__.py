"""Server side of Flower: strategies."""
