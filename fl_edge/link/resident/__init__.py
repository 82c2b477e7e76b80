"""Flower clients that stay warm: one gRPC stream a node, for any strategy and any ClientApp."""
