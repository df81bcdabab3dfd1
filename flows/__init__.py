"""Prefect flows: what users run."""

import logging

# Prefect takes what these log into a run's log (PREFECT_LOGGING_EXTRA_LOGGERS), by their own level.
for _name in ("flows", "tasks"):
    logging.getLogger(_name).setLevel(logging.INFO)
