"""HAT: a language model split between device and cloud. Knows nothing of Flower."""
