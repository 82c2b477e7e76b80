"""Edge devices on one machine: profiles, virtual clock, traffic accounts."""
