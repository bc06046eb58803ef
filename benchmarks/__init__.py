"""Speed and memory, measured by hand."""
