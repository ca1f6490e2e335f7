"""Pipelines at run time: process groups of several models on the same ranks."""
