"""What a run minimises, one file each."""
