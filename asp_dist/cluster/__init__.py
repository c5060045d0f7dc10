"""Training on a Ray cluster; the only part of the project that imports ray."""
