"""Programs for working on the repository; the wheel does not ship them."""
