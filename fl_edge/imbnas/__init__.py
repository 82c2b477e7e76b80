"""IMB-NAS without Flower: a super-network trained on balanced data is adapted to a long tail and searched there."""
