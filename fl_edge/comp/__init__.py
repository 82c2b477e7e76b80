"""COMP: structured pruning of a large language model after training, one decoder layer in memory at a time."""
