"""A stock Flower App: FedAvg with PyTorch."""
