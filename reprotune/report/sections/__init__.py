"""The sections of the report: what the run's numbers say, in parts of a document."""
