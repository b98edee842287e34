"""One module for each operation; each registers its points when it is imported."""
