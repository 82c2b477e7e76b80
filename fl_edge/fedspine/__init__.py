"""FedSpine: prune and tune a transformer together, each device at its own ratio and rank."""
