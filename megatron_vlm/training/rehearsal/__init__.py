"""Play ranks of a job at full size on a device that is not there, and compare what they did."""
