"""Modules and maths of the models: no files, no network."""
