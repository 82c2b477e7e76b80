"""Client side of Flower: one thin module for each workload."""
