"""Controllers: what moves the thresholds, one file per method."""
