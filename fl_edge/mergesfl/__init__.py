"""MergeSFL without Flower: a control module plans each round, a training module merges the workers' features."""
