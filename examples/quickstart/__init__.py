"""The whole path on real input: prepare, train on 4 processes, kill, resume, convert, evaluate, report."""
