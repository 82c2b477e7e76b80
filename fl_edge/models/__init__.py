"""Small models, each cut into a bottom and a top."""
