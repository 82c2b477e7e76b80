"""Data sets that come with packages, real loaders beside them, and how they are split over devices."""
