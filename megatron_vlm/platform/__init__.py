"""This machine: device, CPU stand-ins for CUDA, launching, logs and exit status."""
