"""MergeSFL without Flower: the control module decides whom to ask and for how much, the training module merges features."""
