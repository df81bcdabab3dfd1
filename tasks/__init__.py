"""Units of work, between the flows and the models."""
