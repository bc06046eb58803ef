"""Pure metric functions; distributions over clients are in core.evaluation."""
