"""A run from its configuration: the command, what workers are built from, the export at its end."""
