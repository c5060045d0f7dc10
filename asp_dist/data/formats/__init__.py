"""How images lie on disk: class folders, manifests, tar shards."""
