"""Making data sets: download-free ones, CIFAR, ImageNet; and looking through them for bad files."""
