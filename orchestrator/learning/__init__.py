"""What the notebooks lean on: a model that was trained, mistakes to plant, variants to try."""
