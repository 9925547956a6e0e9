"""What a run minimises, one file each; a file offers the class `Objective` of `training/objective.py`."""
