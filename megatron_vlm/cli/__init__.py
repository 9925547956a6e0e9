"""The command line: one module per verb, which checks its arguments and calls the layers below."""
