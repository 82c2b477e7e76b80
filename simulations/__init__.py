"""The Flower App of this repository: its two components, its launcher, and one YAML a scenario."""
