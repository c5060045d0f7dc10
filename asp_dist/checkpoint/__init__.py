"""Everything between a step and the disk, and back: what a checkpoint holds, where it lies, which ones are kept."""
