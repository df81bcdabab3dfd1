"""Prefect flows: what users run."""
