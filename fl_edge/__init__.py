"""fl_edge: federated work on weak, unequal edge devices, as an extension of Flower.

Importing this package is cheap; torch and Flower are loaded by the modules that use them.
"""

__version__ = "0.1.0"
