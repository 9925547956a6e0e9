"""This job: process groups and rank layout."""
