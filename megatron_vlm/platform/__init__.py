"""This machine: device, stand-ins of the host, launch, logs and exit status."""
